"""The other engines of the benchmark of products compute the product, and are left out where they are not installed."""

from __future__ import annotations

import importlib.util
import struct

import gemv
import masked
import numpy as np
import onnxruntime
import peers
import pytest

RANDOM = np.random.default_rng(0)
WEIGHTS = [(RANDOM.standard_normal((256, 32)) / 16).astype(np.float32)]
X = RANDOM.standard_normal((2, 256)).astype(np.float32)


@pytest.mark.parametrize(("bits", "block", "level"), [(2, 128, 0), (4, 32, 0), (4, 128, 0), (8, 32, 0)])
def test_n_bits_models_hold_the_weight(bits: int, block: int, level: int) -> None:
    model = gemv.n_bits_model(WEIGHTS, 2, bits, block, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X})
    blocks = np.abs(WEIGHTS[0].reshape(-1, block, 32)).max(axis=1)
    # A weight is off by half a step at most.
    half_steps = np.repeat(blocks / (2 ** (bits - 1) - 1), block, axis=0) / 2
    bound = np.abs(X).astype(np.float64) @ half_steps
    assert (np.abs(found - X @ WEIGHTS[0]) <= bound * (1 + 1e-5) + 1e-5).all()
    assert np.abs(found).max() > 0


def test_engines_that_are_not_installed_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KBITC_GGML", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.openvinos(WEIGHTS, X) == {} and peers.ggmls(WEIGHTS, X) == {}


def _library(code: bytes) -> bytes:
    """An ELF file of one segment at address 0x1000, which starts at byte 120 of the file."""
    head = bytearray(64)
    struct.pack_into("<Q", head, 32, 64)
    struct.pack_into("<HH", head, 54, 56, 1)
    segment = struct.pack("<IIQQQQQQ", masked.LOAD_SEGMENT, 5, 120, 0x1000, 0x1000, len(code), len(code), 4096)
    return bytes(head) + segment + code


def test_only_cpuid_is_replaced_and_only_where_it_is_told() -> None:
    code = b"\x90" + masked.CPUID + b"\x90" + masked.CPUID
    made = masked.masked(_library(code), [0x1001])
    assert made == _library(b"\x90" + masked.UD2 + b"\x90" + masked.CPUID)
    with pytest.raises(ValueError, match="no cpuid at 0x1002"):
        masked.masked(_library(code), [0x1002])
