"""Searches the schedules of common products, and puts those that are faster every time into targets/tuned.json.

    python examples/benchmarks/tuned.py [--targets x86:avx512vbmi x86:avx2] [--schemes int4:b32] [--rows 1 many]
    python examples/benchmarks/tuned.py --schemes --codes 8 4      # only static convolutions, of 8 and of 4 bits

What the search of `kbitc tune` finds is measured again REPEATED times, and kept only when it is ahead each time. One
schedule serves 2 to 15 rows and one all from 16 on, so it has to be ahead for each of FEW or MANY, which leave a rest
behind most tiles. Where the rows are not known before the module runs, the schedule for one row and that for many are
put together; that must be behind for no number of rows. Static convolutions have to be ahead at every size of image.
Entries of other processors and products stay in the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import harness

from kbitc.targets.lower.contraction import Contraction, ConvAttributes
from kbitc.targets.target import Target, host_runs, parse_target
from kbitc.targets.trial import made_up_levels, made_up_requantization, made_up_weight
from kbitc.targets.tune import GAIN, gain, search, usual_schedule
from kbitc.targets.tuning import SHIPPED, Entry, Schedule, Tuning, read_tuning, shape_class, weight_text

RULE, CODES = "integer_product", "code_product"
TARGETS = ("x86:avx512vbmi", "x86:avx2")
SCHEMES = ("int4:b32", "nf4:b32", "int8:c", "int2:b32", "int3:b32", "int4:b32/i4")
# (N, K) of MiniLM, BERT-base and models of 7 billion weights.
MATRICES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (4096, 4096), (11008, 4096))
# (C, N, taps across, stride, heights and widths) of convolutions of ResNet-50 and MobileNetV2, for images of 224 and of
# 320 pixels.
CONVOLUTIONS = (
    (64, 64, 3, 1, (56, 80)),
    (256, 64, 1, 1, (56, 80)),
    (64, 256, 1, 1, (56, 80)),
    (128, 128, 3, 1, (28, 40)),
    (256, 256, 3, 1, (14, 20)),
    (256, 1024, 1, 1, (14, 20)),
    (1024, 256, 1, 1, (14, 20)),
    (512, 512, 3, 1, (7, 10)),
    (24, 144, 1, 1, (56, 80)),
    (192, 32, 1, 1, (28, 40)),
)
ONE, FEW, MANY = (1,), (8, 12, 5), (128, 16, 20, 33)
CLASSES = {"1": ONE, "few": FEW, "many": MANY}
ANY = "rows"
# Rows that a kernel for any number of them treats as one row each.
ALONE = (3,)
# Of two equal kernels.
NOISE = 0.98
REPEATED = 3


def product(scheme: str, rows: int, n: int, channels: int) -> Contraction:
    """x [rows, channels] by a weight [n, 1, channels], activations quantized at run time."""
    weight = made_up_weight(scheme, (n, 1, channels))
    block = getattr(weight, "block", 0)
    scale_block = 0 if block >= channels or scheme.endswith("/i4") else block
    return Contraction("m", "matmul", weight, "int8", (rows, channels), (rows, n), scale_block)


def convolution(bits: int, sizes: tuple[int, int, int, int], side: int) -> Contraction:
    """A static convolution (C, N, taps across, stride) of an image of side x side, bordered by half its window."""
    channels, n, across, stride = sizes
    weight, pad = made_up_levels(bits, (n, across * across, channels)), across // 2
    out = (side + 2 * pad - across) // stride + 1
    geometry = ConvAttributes((across, across), (stride, stride), (pad,) * 4)
    return Contraction(
        "c", "conv", weight, "uint8", (1, side, side, channels), (1, out, out, n), conv=geometry,
        requantize=made_up_requantization(n),
    )  # fmt: skip


def repeated(
    schedule: Schedule,
    target: Target,
    products: Sequence[Contraction],
    wanted: float = GAIN,
    *,
    open_rows: bool = False,
) -> float:
    """The least gain of all measurements of all products; stops at the first below what is wanted."""
    least = float("inf")
    for _ in range(REPEATED):
        for made in products:
            least = min(least, gain(schedule, target, made, open_rows=open_rows))
            if least < wanted:
                return least
    return least


def entries(target: Target, scheme: str, n: int, channels: int, classes: Sequence[tuple[int, ...]]) -> Iterator[Entry]:
    """What is faster for one weight, by class of rows."""
    found: dict[tuple[int, ...], Entry] = {}
    for rows in classes:
        products = [product(scheme, count, n, channels) for count in rows]
        shape = shape_class(scheme, rows[:1], (n, 1, channels))
        entry, _ = search(RULE, target, products[0], shape)
        if entry is None:
            continue
        least = repeated(entry.schedule, target, products)
        print(f"  {target} {shape}: {entry.schedule} {entry.speed:.2f}, again {least:.2f}", flush=True)
        if least >= GAIN:
            found[rows] = Entry(RULE, target.name, shape, entry.schedule, least, entry.machine)
            yield found[rows]
    one, many = found.get(ONE), found.get(MANY)
    if one is None and many is None:
        return
    usual = usual_schedule(RULE, target, product(scheme, MANY[0], n, channels))
    tile = usual if many is None else many.schedule
    both = Schedule(tile.rows, tile.tiles, (usual if one is None else one.schedule).few_tiles)
    claimed = (() if one is None else (*ONE, *ALONE)) + (() if many is None else MANY)
    # What no schedule was found for runs the code that it always runs, but with another tile of many rows.
    others = [rows for rows in ONE + FEW + MANY if rows not in claimed] if many is not None else []
    least = repeated(both, target, [product(scheme, rows, n, channels) for rows in claimed], open_rows=True)
    behind = repeated(both, target, [product(scheme, rows, n, channels) for rows in others], NOISE, open_rows=True)
    shape = shape_class(scheme, (ANY,), (n, 1, channels))
    print(f"  {target} {shape}: {both}, again {least:.2f}, {behind:.2f}", flush=True)
    if least >= GAIN and behind >= NOISE:
        measured = one or many
        yield Entry(RULE, target.name, shape, both, least, "" if measured is None else measured.machine)


def convolutions(target: Target, bits: int) -> None:
    """What is faster for static convolutions, into the file."""
    for *sizes, sides in CONVOLUTIONS:
        products = [convolution(bits, tuple(sizes), side) for side in sides]
        weight = products[0].weight
        shape = shape_class(weight_text(weight), products[0].out_shape[:-1], weight.shape)
        entry, _ = search(CODES, target, products[0], shape)
        least = 0.0 if entry is None else repeated(entry.schedule, target, products)
        print(f"  {target} {shape}: {entry and (entry.schedule, entry.speed)}, again {least:.2f}", flush=True)
        found = [] if entry is None or least < GAIN else [replace(entry, speed=least)]
        known = read_tuning(SHIPPED).entries()
        others = [item for item in known if item.key != (CODES, target.name, shape) or not item.here]
        SHIPPED.write_text(Tuning([*others, *found]).text(), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Schedules of common products that ship with kbitc.")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--codes", nargs="*", type=int, default=[8], help="bits of the levels of static convolutions")
    parser.add_argument("--widest", type=int, default=max(n for n, _ in MATRICES), help="leave wider ones out")
    parser.add_argument("--rows", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    given = parser.parse_args()
    classes = [CLASSES[name] for name in given.rows]
    harness.pin()
    for target in map(parse_target, given.targets):
        if (reason := host_runs(target)) is not None:
            raise SystemExit(reason)
        for scheme in given.schemes:
            for n, channels in MATRICES:
                if max(n, channels) <= given.widest:
                    print(f"{target} {scheme} {n}x{channels}", flush=True)
                    keep(list(entries(target, scheme, n, channels, classes)), target, scheme, (n, 1, channels))
        for bits in given.codes:
            convolutions(target, bits)


def keep(found: Sequence[Entry], target: Target, scheme: str, shape: tuple[int, int, int]) -> None:
    """Put what was found into the file, in place of what it says of the same products on this processor."""
    asked = {shape_class(scheme, rows, shape) for rows in (ONE, FEW, MANY[:1], (ANY,))}
    known = read_tuning(SHIPPED).entries() if SHIPPED.is_file() else ()
    others = [entry for entry in known if entry.target != target.name or entry.shape not in asked or not entry.here]
    SHIPPED.write_text(Tuning([*others, *found]).text(), encoding="utf-8")


if __name__ == "__main__":
    main()
