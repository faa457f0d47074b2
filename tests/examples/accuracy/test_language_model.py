"""The language model's parts: the GGUF reader, the tokenizer, the text, the graph, the perplexity."""

from __future__ import annotations

import struct
from pathlib import Path

import brown
import numpy as np
import onnx
import onnxruntime
import pytest
from bpe import BytePair, byte_characters, split_pieces
from build_smollm import Decoder
from gguf_file import BLOCK_TYPES, F32, Q4_1, Q8_0, GgufFile

HEADS, SHARED, SIZE, INNER, WORDS, CONTEXT = 4, 2, 8, 64, 32, 6
WIDTH = HEADS * SIZE


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_gguf(path: Path, metadata: dict[str, bytes], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> None:
    """A GGUF file; metadata values come with their type, tensors as (shape, type, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value for key, value in metadata.items())
    body = b""
    for name, (shape, kind, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


def floats(array: np.ndarray) -> tuple[tuple[int, ...], int, bytes]:
    return array.shape, F32, array.astype("<f4").tobytes()


def test_gguf_values_and_every_code_of_a_block(tmp_path: Path) -> None:
    four, eight = np.zeros(2, BLOCK_TYPES[Q4_1]), np.zeros(1, BLOCK_TYPES[Q8_0])
    four["d"], four["m"], four["q"] = [0.5, 2.0], [-1.0, 3.0], np.arange(16) | (np.arange(16)[::-1] << 4)
    eight["d"], eight["q"] = 0.25, np.arange(-128, 128, 8)
    metadata = {
        "a": struct.pack("<If", 6, 1.5),
        "b": struct.pack("<I", 8) + text("ä"),
        "c": struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz"),
    }
    tensors = {
        "four": ((2, 32), Q4_1, four.tobytes()),
        "eight": ((32,), Q8_0, eight.tobytes()),
        "odd": ((1,), 99, b""),
    }
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    file = GgufFile(tmp_path / "x.gguf")
    assert file.metadata == {"a": 1.5, "b": "ä", "c": ["x", "yz"]}
    codes = np.concatenate([np.arange(16), np.arange(16)[::-1]])
    assert (file.tensor("four") == np.stack([0.5 * codes - 1, 2.0 * codes + 3])).all()
    assert (file.tensor("eight") == 0.25 * np.arange(-128, 128, 8)).all()
    with pytest.raises(ValueError, match="odd: tensor type 99"):
        file.tensor("odd")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGUF\x02\0\0\0" + bytes(16))
    with pytest.raises(ValueError, match="not a GGUF file of version 3"):
        GgufFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("It's 1961, isn't it?", ["It", "'s", " ", "1", "9", "6", "1", ",", " isn", "'t", " it", "?"]),
        ("a  b\n", ["a", " ", " b", "\n"]),
        ('"x_y"', ['"', "x", "_", "y", '"']),
        ("", []),
    ],
)
def test_pieces_cover_the_text(line: str, pieces: list[str]) -> None:
    assert split_pieces(line) == pieces and "".join(pieces) == line


def test_merges_are_made_in_their_order_and_every_byte_has_a_token() -> None:
    characters = byte_characters()
    assert len(set(characters)) == 256 and all(character.isprintable() for character in characters)
    merges = ["b c", "a b", "Ġ a", "bc d"]
    tokens = [*characters, *(merge.replace(" ", "") for merge in merges)]
    tokenizer = BytePair(tokens, merges)
    assert [tokens[i] for i in tokenizer.encode("abcd aab")] == ["a", "bcd", "Ġa", "ab"]
    assert "".join(tokens[i] for i in tokenizer.encode("é\t")) == "".join(characters[b] for b in "é\t".encode())


def test_brown_text_reads_like_text() -> None:
    tagged = "``/`` Is/bez it/pps (/( really/rb )/) 1\\/2/cd so/rb ?/. ?/. ''/''\n\n\tYes/rb ,/, he/pps said/vbd ./."
    assert brown.plain_text(tagged) == '"Is it (really) 1\\/2 so?" Yes, he said.'


def test_perplexity_of_a_uniform_guess_is_the_number_of_tokens() -> None:
    losses = brown.token_losses(np.full((1, 5, 7), 3.0, np.float32), np.arange(5)[None])
    assert losses.shape == (4,)
    assert brown.perplexity(np.array([[losses.sum(), 4, 0]])) == pytest.approx(7, rel=1e-12)
    sure = np.full((1, 3, 7), -1e4, np.float32)
    sure[0, [0, 1], [4, 2]] = 0
    assert (brown.token_losses(sure, np.array([[6, 4, 2]])) == 0).all(), "position n says token n + 1"


def reference_logits(file: GgufFile, tokens: np.ndarray) -> np.ndarray:
    """The decoder in float64 numpy with GGUF's own interleaved rotation, one head after the other."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * file.tensor(name)

    def rotate(x: np.ndarray) -> np.ndarray:
        angles = np.outer(np.arange(CONTEXT), 100.0 ** -(np.arange(0, SIZE, 2) / SIZE))
        turned = ((x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)).view()
        out = np.empty_like(x)
        out[:, 0::2], out[:, 1::2] = turned.real, turned.imag
        return out

    weight = {name: file.tensor(name).astype(np.float64) for name in file.shapes}
    x = weight["token_embd.weight"][tokens]
    h = norm(x, "blk.0.attn_norm.weight")
    q, k, v = (h @ weight[f"blk.0.attn_{part}.weight"].T for part in "qkv")
    mixed = []
    for head in range(HEADS):
        mine, shared = slice(head * SIZE, (head + 1) * SIZE), head // (HEADS // SHARED)
        theirs = slice(shared * SIZE, (shared + 1) * SIZE)
        scores = rotate(q[:, mine]) @ rotate(k[:, theirs]).T / np.sqrt(SIZE)
        scores[np.triu_indices(CONTEXT, 1)] = -np.inf
        shares = np.exp(scores - scores.max(1, keepdims=True))
        mixed.append(shares / shares.sum(1, keepdims=True) @ v[:, theirs])
    x = x + np.concatenate(mixed, 1) @ weight["blk.0.attn_output.weight"].T
    h = norm(x, "blk.0.ffn_norm.weight")
    gate = h @ weight["blk.0.ffn_gate.weight"].T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ weight["blk.0.ffn_up.weight"].T)) @ weight["blk.0.ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ weight["token_embd.weight"].T


def test_the_graph_is_the_decoder(tmp_path: Path) -> None:
    """Against numpy in float64. Bound: 2^-24 a rounding, 64-term sums, some 20 of them in a row."""
    generator = np.random.default_rng(0)
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (SHARED * SIZE, WIDTH), "attn_v": (SHARED * SIZE, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    }  # fmt: skip
    tensors = {f"blk.0.{name}.weight": floats(generator.normal(0, 0.5, shape)) for name, shape in shapes.items()}
    tensors["token_embd.weight"] = floats(generator.normal(0, 1, (WORDS, WIDTH)))
    tensors["output_norm.weight"] = floats(generator.normal(0, 1, WIDTH))
    sizes = {"block_count": 1, "embedding_length": WIDTH, "attention.head_count": HEADS, "attention.head_count_kv": 2}
    metadata = {f"llama.{key}": struct.pack("<II", 4, value) for key, value in sizes.items()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = struct.pack("<If", 6, 1e-5)
    metadata["llama.rope.freq_base"] = struct.pack("<If", 6, 100.0)
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    file = GgufFile(tmp_path / "x.gguf")
    model = Decoder(file, CONTEXT).build()
    onnx.checker.check_model(model, full_check=True)
    tokens = generator.integers(0, WORDS, (2, CONTEXT))
    (got,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"tokens": tokens})
    for row in range(2):
        want = reference_logits(file, tokens[row])
        assert np.abs(got[row] - want).max() <= 2.0**-24 * INNER * 20 * np.abs(want).max()
