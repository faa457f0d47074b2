"""Which data type loses least: SQNR of weights by type and width, on normal numbers and on real models' weights.

    python examples/accuracy/data_types.py [--solver rtn] [--update docs/schemes.md]

SQNR = 10 log10(sum w^2 / sum (w - quantized w)^2) in dB, the mean over the weights of a model; blocks of 64 along the
reduction axis, f16 scales. Prints Markdown tables; --update puts them between the marks of a document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.graph import ops
from kbitc.importer import load_model
from kbitc.options import SOLVERS
from kbitc.passes.allocate.survey import survey
from kbitc.passes.canonicalize import canonicalize
from kbitc.quant.metrics import sqnr_db
from kbitc.quant.scheme import QuantScheme, fixed_formats
from kbitc.quant.tensor import QTensor, storage_bits

FloatArray = npt.NDArray[np.float32]
Solve = Callable[[FloatArray, QuantScheme], QTensor]
BLOCK = 64
FAMILIES = ("int", "uint", "nf", "fp", "dynexp", "log2", "quantile", "kmeans")
WIDTHS = range(2, 9)
MOST_WEIGHTS = 1 << 20  # of one tensor; of larger ones every second, third ... row is taken
SCALES = ("int4:b32", "int4:b32/i4", "int4:b32:dq8", "int3:b32", "int3:b32/i4", "uint4:b32", "uint4:b32/i4",
          "uint4:b32:min", "uint3:b32", "uint3:b32:min", "fp4:b32", "fp4:b32/i4", "nf4:b64", "nf4:b64:dq8")  # fmt: skip
BEGIN, END = "<!-- made by examples/accuracy/data_types.py -->\n", "<!-- end -->\n"


def normal_weights() -> Iterator[FloatArray]:
    """Weights f32 [N, T, C], independent and normal."""
    yield np.random.default_rng(0).normal(size=(256, 1, 4096)).astype(np.float32)


def minilm_weights() -> Iterator[FloatArray]:
    """The matrices of the MiniLM sentence encoder, its word embedding among them."""
    from safetensors.numpy import load_file

    for name, array in sorted(load_file(fetch.fetch("minilm") / "model.safetensors").items()):
        if array.ndim == 2 and "position" not in name and "token_type" not in name:
            yield np.ascontiguousarray(array, np.float32)[:, None, :]


def magika_weights() -> Iterator[FloatArray]:
    """What kbitc would quantize of the file type classifier magika."""
    model = canonicalize(load_model(fetch.fetch("magika") / "model.onnx"))
    for candidate in survey(model):
        weight = model.graph.initializers[candidate.tensor].const_value
        if candidate.obstacle is None and weight is not None:
            yield np.asarray(ops.to_view(weight.numpy(), candidate.kind), np.float32)


SOURCES = {"normal": normal_weights, "MiniLM": minilm_weights, "magika": magika_weights}


def sample(weight: FloatArray) -> FloatArray:
    """Some rows of a large weight."""
    return np.ascontiguousarray(weight[:: -(-weight.size // MOST_WEIGHTS)])


def mean_sqnr(weights: Sequence[FloatArray], scheme: QuantScheme, solve: Solve) -> float:
    """Mean over weights of the SQNR in dB."""
    found = []
    for weight in weights:
        error = weight.astype(np.float64) - solve(weight, scheme).dequantize()
        found.append(sqnr_db(float(np.square(weight, dtype=np.float64).sum()), float(np.square(error).sum())))
    return float(np.mean(found))


def scheme_of(text: str) -> QuantScheme | None:
    """The scheme, or None where a family has no such width."""
    try:
        return QuantScheme.parse(text)
    except UsageError:
        return None


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |\n"


def heading(cells: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return row(cells) + "|" + "---|" * len(cells) + "\n"


def best_marked(values: Sequence[float | None], best: Sequence[float]) -> list[str]:
    """Numbers as text, the best of each column bold."""
    text = []
    for value, top in zip(values, best, strict=True):
        shown = "" if value is None else f"{value:.1f}"
        text.append(f"**{shown}**" if value is not None and value == top else shown)
    return text


def family_table(weights: Sequence[FloatArray], solve: Solve) -> str:
    """SQNR by family and width."""
    found: dict[str, list[float | None]] = {}
    for family in FAMILIES:
        schemes = [scheme_of(f"{family}-{bits}:b{BLOCK}") for bits in WIDTHS]
        found[family] = [None if scheme is None else mean_sqnr(weights, scheme, solve) for scheme in schemes]
    best = [max(column[i] or 0 for column in found.values()) for i in range(len(WIDTHS))]
    lines = [row([name, *best_marked(values, best)]) for name, values in found.items()]
    return heading(["type", *(f"{bits} bits" for bits in WIDTHS)]) + "".join(lines)


def float_table(weights: Sequence[FloatArray], solve: Solve) -> str:
    """Every split of small floats: its different levels and its SQNR."""
    lines = []
    for bits in WIDTHS:
        for data_type, variant in fixed_formats(bits):
            if data_type.name == "fp":
                scheme = QuantScheme.parse(f"fp{bits}-{variant}:b{BLOCK}")
                count = f"{len(set(data_type.levels))} of {2**bits}"
                lines.append(row([f"fp{bits}-{variant}", count, f"{mean_sqnr(weights, scheme, solve):.1f}"]))
    return heading(["type", "different levels", "SQNR"]) + "".join(lines)


def scale_table(sources: dict[str, list[FloatArray]], solve: Solve) -> str:
    """What quantized scales cost and save."""
    lines = []
    for text in SCALES:
        scheme = QuantScheme.parse(text)
        shape = (4096, 1, 4096)
        bits = storage_bits(shape, scheme) / (shape[0] * shape[2])
        numbers = [f"{mean_sqnr(weights, scheme, solve):.2f}" for weights in sources.values()]
        lines.append(row([f"`{text}`", f"{bits:.3f}", *numbers]))
    return heading(["scheme", "bits a weight", *sources]) + "".join(lines)


def report(solver: str) -> str:
    """All tables."""
    solve: Solve = catalog.find(SOLVERS, solver, "solver").solve
    sources = {name: [sample(weight) for weight in make()] for name, make in SOURCES.items()}
    parts = []
    for name, weights in sources.items():
        print(f"{name}: {len(weights)} weights", file=sys.stderr)
        parts.append(f"{name}, {solver}, blocks of {BLOCK}:\n\n{family_table(weights, solve)}")
    parts.append(f"Small floats on normal weights:\n\n{float_table(sources['normal'], solve)}")
    parts.append(f"Quantized scales (bits of a weight of 4096 by 4096):\n\n{scale_table(sources, solve)}")
    return "\n".join(parts)


def main() -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solver", default="rtn", help="which solver quantizes")
    parser.add_argument("--update", type=Path, help="document that gets the tables between its marks")
    chosen = parser.parse_args()
    text = report(chosen.solver)
    if chosen.update is None:
        print(text)
        return
    before, _, rest = chosen.update.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    chosen.update.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
