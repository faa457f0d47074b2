"""Integer matrix products and convolutions with AVX2."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.quant.format import Format
from kbitc.quant.scheme import QuantScheme
from kbitc.targets.kernels.qgemm import QgemmSpec, _Generator, halves
from kbitc.targets.kernels.rows import MatmulRows
from kbitc.targets.x86.intrin.avx2 import Avx2
from tests.support import kernels
from tests.support.kernels import Case
from tests.support.products import AVX2, CASES, CONVOLUTIONS, VNNI, check, compiled, need, results


@pytest.mark.parametrize("case", [*CASES, *CONVOLUTIONS], ids=lambda case: case.name)
def test_accumulators_are_numpys(case: Case) -> None:
    need(AVX2)
    check(case, results(AVX2))


def test_floats_are_those_of_vnni_bit_for_bit() -> None:
    for target_name in (AVX2, VNNI):
        need(target_name)
    for case in (*CASES, *CONVOLUTIONS):
        np.testing.assert_array_equal(results(AVX2)[case.name], results(VNNI)[case.name], err_msg=case.name)


def test_build_uses_vpmaddubsw_and_no_memory_for_levels() -> None:
    assembly = compiled(AVX2).assembly()
    hot = kernels.hot_blocks(assembly, "vpmaddubsw")
    assert hot and all("call" not in block for block in hot)
    assert "%zmm" not in assembly and "vpdpbusd" not in assembly


FORMATS = [*(f"int{k}" for k in range(1, 9)), "nf4", "nf7", "fp4", "log2-4", "uint8"]


def data_type_of(name: str) -> Format:
    return QuantScheme.parse(f"{name}:b32:zp" if name.startswith("uint") else f"{name}:b32").data_type()


def generator_of(name: str) -> _Generator:
    spec = QgemmSpec(
        outputs=16,
        taps=1,
        channels=32,
        data_type=data_type_of(name),
        block=32,
        scale_per_block=True,
        scale_dtype="float16",
        rows=MatmulRows((1,)),
    )
    return _Generator(spec, Avx2())


@pytest.mark.parametrize("name", FORMATS)
def test_a_chain_of_the_largest_products_fits_16_bits(name: str) -> None:
    isa, data_type = Avx2(), data_type_of(name)
    feed = isa.feed(data_type)
    fed = np.array(data_type.levels) + feed.bias
    assert (fed.min(), fed.max()) == feed.ends
    # In both feeds the unsigned operand is the size of what is fed.
    pair = 2 * int(np.abs(fed).max()) * 127
    assert 1 <= isa.chain(feed) and isa.chain(feed) * pair <= 32767 < (isa.chain(feed) + 1) * pair


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_in_one_chain_fits_16_bits_whatever_its_numbers(name: str) -> None:
    """The worst activations of a lane, found one by one: each adds as much as it can to one side."""
    generator = generator_of(name)
    fits = [steps for steps in range(1, 17) if generator.one_chain(steps)]
    assert fits == list(range(1, len(fits) + 1))
    ends = np.array(generator.feed.ends)
    for steps in fits:
        for half in halves(generator.excess):
            own = 2 * steps * 127 * np.abs(ends - half).max()
            assert own + 2 * steps * 127 * abs(half) <= 32767


def test_blocks_of_32_with_up_to_4_bits_are_one_chain() -> None:
    def steps(name: str) -> int:
        return sum(generator_of(name).one_chain(count) for count in range(1, 17))

    assert [steps(f"int{bits}") >= 8 for bits in range(1, 9)] == [True] * 4 + [False] * 4
