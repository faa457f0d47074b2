"""The text form of a scheme."""

from __future__ import annotations

import pytest

from kbitc.errors import UsageError
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleType


@pytest.mark.parametrize(
    "text", ["int4:b32", "uint4:b64:zp", "nf4:b64", "int8:c", "int8:t", "int4:b32:f32", "uint1:b1024:zp", "nf7:c:f32"]
)
def test_the_normal_form_is_read_back(text: str) -> None:
    assert str(QuantScheme.parse(text)) == text


def test_defaults_are_block_32_and_f16_scales() -> None:
    assert QuantScheme.parse("int3") == QuantScheme("int", 3, Granularity.BLOCK, 32, False, ScaleType.F16)


def test_uint_always_has_a_zero_point() -> None:
    assert str(QuantScheme.parse("uint2:b16")) == "uint2:b16:zp"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not a quantization scheme"),
        ("4", "not a quantization scheme"),
        ("int", "not a quantization scheme"),
        ("int0:b32", "1 to 8 bits"),
        ("int9:b32", "1 to 8 bits"),
        ("int4:b0", "multiple of 16"),
        ("int4:b24", "multiple of 16"),
        ("int4:b2048", "multiple of 16"),
        ("int4:x", "unknown part"),
        ("int4:b32:zp", "has no zero point"),
        ("nf8:b32", "2 to 7 bits"),
        ("unit4:b32", "did you mean"),
        ("INT4", "not a quantization scheme"),
    ],
)
def test_what_is_no_scheme_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        QuantScheme.parse(text)
