"""Rendered lines of text with labels, for the PP-OCR models: a small accuracy test that needs no data set.

    python examples/lines.py --show lines.png          look at what is drawn
    python examples/lines.py --npz feeds.npz           inputs for `kbitc run` and `kbitc verify`
    python examples/lines.py --accuracy                float accuracy of the angle classifier and the recogniser

The lines are made of the words below, drawn with the font that Pillow carries (Aileron), dark on light or light on
dark, with some noise. One seed gives the same pixels with the same Pillow version.

The preprocessing is PP-OCR's (Du et al., arXiv 2009.09941): scale to height 48 keeping the ratio, x/255 -> (x-0.5)/0.5,
zeros on the right. Classifier: f32 [N, 3, 48, 192], classes 0 = upright, 1 = turned by 180 degrees. Recogniser:
f32 [N, 3, 48, W] -> f32 [N, W/8, characters + 2] probabilities, decoded by CTC (class 0 is the blank).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    sys.exit("lines: this needs Pillow: pip install pillow")

HEIGHT = 48  # pixels, of every model input
CLASSIFIER_WIDTH = 192  # pixels
WIDTH_STEP = 8  # the recogniser makes one time step of 8 columns
BATCH = 20  # lines, when measuring

WORDS = """
about above across after again against almost along already also always among answer apple around arrive autumn away
balance basket beautiful because become before begin behind believe below beside better between beyond blanket bottle
branch bread bridge bright bring brother build butter candle captain careful carry castle catch center certain chance
change child choose circle clear close cloud coffee cold collect color common company complete corner could country
cousin cover cross danger daughter deep depend desert different dinner direction distance doctor double dream during
early earth eight either empty engine enough evening every example explain family famous farmer father field finger
finish first flower follow forest forward fresh friend garden gentle glass golden government great green ground group
happen harbor heart heavy history holiday honest hundred important inside instead island journey kitchen kitten ladder
language large laugh learn leather letter library light listen little lonely machine market matter meadow measure
middle minute mirror moment money morning mother mountain music narrow nature nearly needle neighbor never night north
nothing number object ocean office often orange other outside over paper parent pencil people perhaps person picture
place plain planet pocket police possible potato present pretty problem promise public purple question quick quiet
rabbit rather ready reason record remember rhythm ribbon river school science second season secret sentence several
shadow share shelter shoulder silence silver simple sister sleep small smooth soldier south special spring square
station steady stone storm story straight stream street strong student sudden sugar summer sunday surface table teacher
temple thank their theater thick thing thousand thread through thunder ticket tomorrow toward travel tunnel twelve
under until upon useful valley village visit voice walnut warm water weather welcome western wheel whisper white
whole window winter within without wonder wooden world worry write yellow yesterday young zebra
""".split()


@dataclass(frozen=True)
class Line:
    """One rendered line. pixels: u8 [height, width], grey; turned: the pixels are rotated by 180 degrees."""

    text: str
    pixels: npt.NDArray[np.uint8]
    turned: bool


def sentence(generator: np.random.Generator) -> str:
    """Three to six words, the first with a capital; sometimes a number or a comma inside, sometimes a full stop."""
    words = [str(word) for word in generator.choice(WORDS, size=int(generator.integers(3, 7)))]
    words[0] = words[0].capitalize()
    if generator.random() < 0.3:
        words[int(generator.integers(1, len(words)))] = str(generator.integers(2, 2000))
    if generator.random() < 0.2:
        words[-2] += ","
    return " ".join(words) + ("." if generator.random() < 0.4 else "")


def draw(text: str, size: int, ink: int, paper: int, margin: int) -> npt.NDArray[np.uint8]:
    """The text in one line, u8 [height, width]; size and margin in pixels, ink and paper are grey levels 0 to 255."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin), paper)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, fill=ink, font=font)
    return np.asarray(image, np.uint8)


def make_lines(count: int, seed: int = 0, turn_half: bool = True) -> list[Line]:
    """`count` lines; with `turn_half` every second one is turned by 180 degrees."""
    generator = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        text = sentence(generator)
        ink, paper = int(generator.integers(0, 90)), int(generator.integers(180, 256))
        if generator.random() < 0.2:
            ink, paper = paper, ink
        size, margin = int(generator.integers(22, 44)), int(generator.integers(2, 7))
        pixels = draw(text, size, ink, paper, margin).astype(np.float64)
        pixels += generator.normal(0.0, generator.uniform(0.0, 12.0), pixels.shape)
        turned = turn_half and index % 2 == 1
        grey = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        lines.append(Line(text, np.ascontiguousarray(grey[::-1, ::-1]) if turned else grey, turned))
    return lines


def scaled_width(pixels: npt.NDArray[np.uint8]) -> int:
    """Width in pixels of the line once it is 48 pixels high."""
    return math.ceil(HEIGHT * pixels.shape[1] / pixels.shape[0])


def to_input(pixels: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.float32]:
    """f32 [3, 48, width] in -1 to 1: scaled to height 48, squeezed when wider than `width`, zeros to its right."""
    own_width = min(width, scaled_width(pixels))
    scaled = Image.fromarray(pixels).resize((own_width, HEIGHT), Image.Resampling.BILINEAR)
    values = np.zeros((3, HEIGHT, width), np.float32)
    values[:, :, :own_width] = (np.asarray(scaled, np.float32) / 255.0 - 0.5) / 0.5
    return values


def classifier_batch(lines: Sequence[Line]) -> npt.NDArray[np.float32]:
    """f32 [len(lines), 3, 48, 192]."""
    return np.stack([to_input(line.pixels, CLASSIFIER_WIDTH) for line in lines])


def recogniser_batch(lines: Sequence[Line]) -> npt.NDArray[np.float32]:
    """f32 [len(lines), 3, 48, W], W = the widest line, rounded up to a multiple of 8."""
    widest = max(scaled_width(line.pixels) for line in lines)
    width = -(-widest // WIDTH_STEP) * WIDTH_STEP
    return np.stack([to_input(line.pixels, width) for line in lines])


def batches(lines: Sequence[Line], size: int = BATCH) -> Iterator[Sequence[Line]]:
    """The lines in groups of `size`."""
    for start in range(0, len(lines), size):
        yield lines[start : start + size]


def classifier_accuracy(probabilities: npt.NDArray[np.float32], lines: Sequence[Line]) -> float:
    """Share of the lines whose turn is told right. probabilities: f32 [len(lines), 2]."""
    turned = np.array([line.turned for line in lines])
    return float((probabilities.argmax(axis=1) == turned).mean())


def read_alphabet(model: Path) -> list[str]:
    """Class names of the recogniser, from the metadata `character` of its ONNX file: blank, characters, space."""
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    if "character" not in metadata:
        raise ValueError(f"{model}: no metadata entry 'character'; give the original PP-OCR recogniser")
    return ["", *metadata["character"].splitlines(), " "]


def decode(probabilities: npt.NDArray[np.float32], alphabet: Sequence[str]) -> list[str]:
    """Best-path CTC decoding (Graves et al., ICML 2006): repeats merged, blanks dropped. f32 [N, T, classes]."""
    texts = []
    for row in probabilities.argmax(axis=2):
        starts = np.concatenate(([True], row[1:] != row[:-1]))
        texts.append("".join(alphabet[index] for index in row[starts & (row != 0)]))
    return texts


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def errors(read: str, line: Line) -> tuple[int, int]:
    """Edits from the text read to the line's, and its characters; spaces are not counted."""
    want = line.text.replace(" ", "")
    return edit_distance(read.replace(" ", ""), want), len(want)


def character_error_rate(read: Sequence[str], lines: Sequence[Line]) -> float:
    """Edits over characters, spaces not counted (the recogniser often merges the words of rendered text)."""
    counts = [errors(got, line) for got, line in zip(read, lines, strict=True)]
    return sum(edits for edits, _ in counts) / sum(characters for _, characters in counts)


def show(lines: Sequence[Line], path: Path) -> None:
    """Write the lines below each other into one picture."""
    width = max(line.pixels.shape[1] for line in lines)
    rows = [np.pad(line.pixels, ((1, 1), (0, width - line.pixels.shape[1])), constant_values=128) for line in lines]
    Image.fromarray(np.concatenate(rows)).save(path)


def print_float_accuracy(count: int, seed: int) -> None:
    """Accuracy of both models in onnxruntime, before any quantization."""
    import onnxruntime
    from fetch import fetch

    folder = fetch("ocr")
    classifier = onnxruntime.InferenceSession(str(folder / "ch_ppocr_mobile_v2.0_cls_infer.onnx"))
    lines = make_lines(count, seed)
    name = classifier.get_inputs()[0].name
    scores = [classifier.run(None, {name: classifier_batch(part)})[0] for part in batches(lines)]
    accuracy = classifier_accuracy(np.concatenate(scores), lines)
    print(f"angle classifier: {100 * accuracy:.1f} % of {count} lines told right")

    model = folder / "ch_PP-OCRv4_rec_infer.onnx"
    recogniser, alphabet = onnxruntime.InferenceSession(str(model)), read_alphabet(model)
    upright = make_lines(count, seed, turn_half=False)
    name = recogniser.get_inputs()[0].name
    read: list[str] = []
    for part in batches(upright):
        read += decode(recogniser.run(None, {name: recogniser_batch(part)})[0], alphabet)
    print(f"recogniser: character error rate {100 * character_error_rate(read, upright):.2f} % of {count} lines")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Rendered lines of text for the PP-OCR models.")
    parser.add_argument("--show", type=Path, metavar="PNG", help="write the first lines into a picture")
    parser.add_argument("--npz", type=Path, metavar="NPZ", help="write inputs of the classifier: x f32 [N, 3, 48, 192]")
    parser.add_argument("--accuracy", action="store_true", help="float accuracy of both models in onnxruntime")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.show:
        show(make_lines(min(options.count, 20), options.seed), options.show)
    if options.npz:
        np.savez(options.npz, x=classifier_batch(make_lines(options.count, options.seed)))
    if options.accuracy:
        print_float_accuracy(options.count, options.seed)


if __name__ == "__main__":
    main()
