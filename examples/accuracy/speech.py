"""Voice activity: is there speech in each 32 ms of a recording, by silero-vad.

The recording is the only one. It is cut into ten pieces of 3 s: one calibrates, nine are measured. The network
remembers (LSTM), so it hears the second before a piece too, which is not measured with it. Three seconds of one voice
are little to calibrate with: the piece is also played faster, slower, softer and with noise.
"""

from __future__ import annotations

import itertools
import wave
from pathlib import Path

import fetch
import numpy as np
import numpy.typing as npt
from tasks import Array, Outputs, Task

RATE, FRAME, CONTEXT, STATE = 16000, 512, 64, 128  # samples a second, of a frame, before it; numbers remembered
THRESHOLD = 0.5
PIECE, BEFORE = 93, 31  # frames of a piece, and those heard before it
SPEEDS, GAINS, NOISES = (1.0, 0.85, 1.15), (1.0, 0.3), (0.0, 0.003)  # of the variants that calibrate
CALIBRATES = 2  # the piece in which speech begins, 6 s into the recording


def read_samples(path: Path) -> npt.NDArray[np.float32]:
    """A 16-bit recording at 16 kHz, f32 in -1 to 1."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise ValueError(f"{path}: expected one channel of 16 bits at {RATE} Hz")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15


def framed(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Frames, each with the samples before it: f32 [frames, 576]."""
    samples = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    count = (len(samples) - CONTEXT) // FRAME
    return np.stack([samples[FRAME * i : FRAME * (i + 1) + CONTEXT] for i in range(count)])


def variants(samples: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """A short recording as it might have been: at other speeds, softer, and noisier; as long as it is."""
    generator = np.random.default_rng(0)
    found = []
    for speed, gain, noise in itertools.product(SPEEDS, GAINS, NOISES):
        places = np.arange(len(samples)) * speed % (len(samples) - 1)
        heard = np.interp(places, np.arange(len(samples)), samples) * gain
        found.append((heard + noise * generator.standard_normal(len(samples))).astype(np.float32))
    return found


def read_labels(path: Path, count: int) -> npt.NDArray[np.bool_]:
    """Whether someone speaks in the middle of each of `count` frames; RTTM lines hold begin and length in seconds."""
    middles = (np.arange(count) + 0.5) * FRAME / RATE
    speech = np.zeros(count, np.bool_)
    for line in path.read_text(encoding="utf-8").splitlines():
        begin, length = (float(field) for field in line.split()[3:5])
        speech |= (begin <= middles) & (middles < begin + length)
    return speech


def f1(rows: Array) -> float:
    """F1 in percent of frames called speech at the threshold. rows: f64 [frames, 2] of probability and label."""
    said, speech = rows[:, 0] >= THRESHOLD, rows[:, 1] > 0
    return 200 * float((said & speech).sum() / (said.sum() + speech.sum()))


def area_under_curve(rows: Array) -> float:
    """Chance that a frame of speech gets a higher probability than one without, ties by half, in percent."""
    speech, silence = rows[rows[:, 1] > 0, 0], rows[rows[:, 1] == 0, 0]
    higher = (speech[:, None] > silence).mean() + 0.5 * (speech[:, None] == silence).mean()
    return 100 * float(higher)


def feeds(frames: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Inputs of the network for one recording, with nothing remembered."""
    state = np.zeros((1, 1, STATE), np.float32)
    return {"input": frames, "h": state, "c": state}


def voice_activity() -> Task:
    """F1 of the frames of nine pieces, in percent; AUC in the details."""
    folder = fetch.fetch("data-speech30s")
    frames = framed(read_samples(folder / "sample.wav"))
    speech = read_labels(folder / "sample.rttm", len(frames))
    silence = np.zeros((BEFORE, frames.shape[1]), np.float32)
    heard = np.concatenate([silence, frames])
    starts = list(range(0, len(frames) - PIECE + 1, PIECE))
    calibrating = starts.pop(CALIBRATES)
    wanted = np.concatenate([speech[start : start + PIECE] for start in starts])

    def rows(outputs: Outputs) -> Array:
        said = np.concatenate([output["speech_probs"].reshape(-1)[BEFORE:] for output in outputs])
        return np.stack([said, wanted], axis=1).astype(np.float64)

    model = fetch.fetch("silero-vad") / "silero_vad_16k_sequence.onnx"
    batches = [feeds(heard[start : start + BEFORE + PIECE]) for start in starts]
    # The calibrating piece in place of the second before it, too: no frame that is measured calibrates.
    own = frames[calibrating : calibrating + PIECE, CONTEXT:].reshape(-1)
    heard_too = [framed(each) for each in variants(own)]
    return Task(
        "voice activity", model, batches, batches[0], rows, f1, "F1 {:.2f} %",
        (f"input={BEFORE + PIECE}x{FRAME + CONTEXT}",),
        [feeds(np.concatenate([each[-BEFORE:], each])) for each in heard_too],
        details=lambda rows: {"AUC, %": area_under_curve(rows)},
    )  # fmt: skip
