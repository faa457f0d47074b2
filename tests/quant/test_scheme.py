"""The text form of a scheme."""

from __future__ import annotations

import pytest

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.quant.scheme import FORMATS, Granularity, QuantScheme, ScaleType


@pytest.mark.parametrize(
    "text",
    [
        *("int4:b32", "uint4:b64:zp", "nf4:b64", "int8:c", "int8:t", "int4:b32:f32", "uint1:b1024:zp", "nf7:c:f32"),
        *(
            "fp4-e2m1:b32",
            "fp8-e4m3:c",
            "log2-4-r1:b32",
            "log2-4-r2:t:f32",
            "dynexp8:b16",
            "quantile3:b64",
            "kmeans4:t",
        ),
        *("int4:b32/i4", "uint4:b64/i4:zp:f32", "fp4-e2m1:b32/i4", "int4:b64:dq8", "nf4:b64:dq8:f32", "uint3:c:zp:dq8"),
        *("uint4:b32:min", "uint3:c:min", "uint8:b1024:min:f32", "uint1:t:min"),
    ],
)
def test_the_normal_form_is_read_back(text: str) -> None:
    assert str(QuantScheme.parse(text)) == text


def test_defaults_are_block_32_and_f16_scales() -> None:
    assert QuantScheme.parse("int3") == QuantScheme("int", 3, Granularity.BLOCK, 32, False, ScaleType.F16)


def test_uint_has_a_zero_point_unless_it_has_an_offset() -> None:
    assert str(QuantScheme.parse("uint2:b16")) == "uint2:b16:zp"
    assert str(QuantScheme.parse("uint2:min:b16")) == "uint2:b16:min"
    assert QuantScheme.parse("uint2:b16:min").offset and not QuantScheme.parse("uint2:b16:min").zero_point


@pytest.mark.parametrize("name", catalog.names(FORMATS))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_scheme_of_every_data_type_is_read_back(name: str, bits: int) -> None:
    """Or the family refuses the width, naming it."""
    for rest in ("b16", "b1024", "c", "t", "b32/i4", "b64:dq8", "b64:f32", "b32:min"):
        try:
            scheme = QuantScheme.parse(f"{name}-{bits}:{rest}")
        except UsageError as error:
            assert str(bits) in str(error) or "has no offset" in str(error)
            continue
        assert QuantScheme.parse(str(scheme)) == scheme
        assert str(QuantScheme.parse(str(scheme))) == str(scheme)


def test_a_family_with_variants_has_a_default() -> None:
    assert str(QuantScheme.parse("fp4")) == "fp4-e2m1:b32"
    assert str(QuantScheme.parse("log2-4")) == "log2-4-r1:b32"
    assert str(QuantScheme.parse("log2-6")) == "log2-6-r4:b32"


@pytest.mark.parametrize(
    ("text", "largest"), [("int4:b32/i4", 15), ("int3:b32/i4", 15), ("uint4:b32/i4", 8), ("fp4:b32/i4", 10)]
)
def test_integer_block_scales_leave_products_in_int8(text: str, largest: int) -> None:
    scheme = QuantScheme.parse(text)
    assert scheme.largest_scale_code == largest
    assert largest * scheme.data_type().largest <= 127


def test_one_scale_a_channel_has_no_integer_block_scales() -> None:
    assert str(QuantScheme.parse("int4:b32/i4").per_channel()) == "int4:c"
    assert str(QuantScheme.parse("nf4:b32:dq8:f32").per_channel()) == "nf4:c:dq8:f32"
    assert str(QuantScheme.parse("uint4:b32:min").per_channel()) == "uint4:c:min"


@pytest.mark.parametrize(
    ("text", "bits", "becomes"),
    [
        ("int4:b32", 3, "int3:b32"),
        ("fp4-e2m1:b32", 6, "fp6-e2m3:b32"),
        ("fp4-e3m0:b32", 4, "fp4-e3m0:b32"),
        ("log2-4:b64", 5, "log2-5-r2:b64"),
        ("int4:b32/i4", 3, "int3:b32/i4"),
        ("int4:b32/i4", 8, "int8:b32"),
        ("nf4:b64:dq8", 7, "nf7:b64:dq8"),
        ("uint4:b64:min", 3, "uint3:b64:min"),
    ],
)
def test_a_scheme_at_another_width(text: str, bits: int, becomes: str) -> None:
    assert str(QuantScheme.parse(text).with_bits(bits)) == becomes


def test_a_width_that_a_data_type_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="use int8"):
        QuantScheme.parse("kmeans4:b32").with_bits(8)


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
        ("fp4-e9m9", "use e2m1, e1m2, e3m0"),
        ("int4-e2m1", "drop -e2m1"),
        ("fp1", "use int1"),
        ("log2", "did you mean log2"),
        ("log2-4-r3", "use r1, r2"),
        ("kmeans8", "use int8"),
        ("int4:b32:b64", "twice"),
        ("int4:c:t", "twice"),
        ("int4:b32/i4:dq8", "twice"),
        ("int4:b32/i9", "unknown part"),
        ("int4:c/i4", "unknown part"),
        ("int5:b32/i4", "leave integer block scales of 1 to 7"),
        ("int8:b32/i4", "leave integer block scales of 1 to 0"),
        ("nf4:b32/i4", "leave integer block scales of 1 to 1"),
        ("int4:t:dq8", "not worth quantizing"),
        ("int4:b32:min", "has no offset.*use uint4"),
        ("nf4:b32:min", "has no offset"),
        ("uint4:zp:min", "not both.*drop :zp"),
        ("uint4:b32/i4:min", "float scales.*drop i4, or use :zp"),
        ("uint4:b32:min:dq8", "float scales.*drop dq8"),
        ("uint4:min:min", "twice"),
    ],
)
def test_what_is_no_scheme_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        QuantScheme.parse(text)
