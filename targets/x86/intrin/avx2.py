"""AVX2 (Haswell and later): dot products of bytes by vpmaddubsw where it cannot saturate, summed in 16 bits meanwhile.

It multiplies unsigned by signed bytes and adds pairs of products in int16. Two feeds keep it exact for any
activations in -127 .. 127 (see `vpmaddubsw.sums`):

- Levels of a range up to 127 are fed unsigned. The smaller the range, the more results are added in 16 bits (vpaddw,
  which `Isa.chain` counts: 129 for 1 bit, 8 for 4 bits, 1 for 7 bits) before one vpmaddwd by ones widens them.
- Other levels, -128 .. 127, are fed by their size, and the activations get their signs (vpsignb): 2 * 128 * 127 fits.
"""

from __future__ import annotations

from typing import Any

from kbitc.quant.format import Format
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Feed, Isa, feed_of
from kbitc.targets.target import ACTIVATION_LEVEL
from kbitc.targets.x86.intrin import fence, vpmaddubsw, vpmaddwd, vpshufb, vpsignb
from kbitc.targets.x86.intrin.tables import look_up_bytes, table_registers

Expr = Any
# Of a byte that is fed unsigned.
LARGEST = 127


class Avx2(Isa):
    """16 registers of 8 int32 lanes: a tile is two registers."""

    name = "avx2"
    lanes = vpmaddwd.LANES
    registers = 16
    signed = False
    rows = 4
    tiles = 1
    vector_tiles = 4
    # Levels that are fed by their size take registers for both, beside the table: measured 1.1 to 1.3 times on Zen 4.
    look_up_tiles = 1

    def feed(self, data_type: Format) -> Feed:
        """See `Isa.feed`: unsigned where the range of the levels fits 7 bits."""
        unsigned = feed_of(data_type, signed=False, lowest=0)
        return unsigned if unsigned.largest <= LARGEST else feed_of(data_type, signed=True)

    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """See `Isa.table`."""
        return table_registers(entries, self.bytes)

    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """See `Isa.look_up`."""
        return look_up_bytes(table, codes, self.bytes, vpshufb.emit)

    def chain(self, feed: Feed) -> int:
        """See `Isa.chain`."""
        return vpmaddubsw.sums(feed.largest, ACTIVATION_LEVEL)

    def split(self, levels: Expr, feed: Feed) -> tuple[Expr, ...]:
        """See `Isa.split`: the levels, or their sizes and themselves."""
        if feed.ends[0] >= 0:
            return (levels,)
        signed = v.bind(v.reinterpret(levels, "int8", self.bytes))
        return v.bind(v.reinterpret(vpsignb.emit(signed, signed), "uint8", self.bytes)), signed

    def broadcast(self, word: Expr) -> tuple[Expr, ...]:
        """See `Isa.broadcast`."""
        return (v.bind(v.reinterpret(v.splat(word, self.lanes), "int8", self.bytes)),)

    def narrow(self, sums: Expr | None, levels: tuple[Expr, ...], activations: tuple[Expr, ...], feed: Feed) -> Expr:
        """See `Isa.narrow`."""
        signed = activations[0] if len(levels) == 1 else v.bind(vpsignb.emit(activations[0], levels[1]))
        pairs = v.bind(vpmaddubsw.emit(levels[0], signed, (feed.largest, ACTIVATION_LEVEL)))
        return pairs if sums is None else v.bind(fence.emit(sums + pairs, "int16", vpmaddubsw.LANES))

    def keep_order(self, doubt: Expr) -> None:
        """See `Isa.keep_order`."""
        fence.keep_order(doubt)

    def widened(self, pairs: Expr, factors: Expr) -> Expr:
        """See `Isa.widened`."""
        return vpmaddwd.emit(pairs, factors)

    def dot(self, sums: Expr, levels: tuple[Expr, ...], activations: tuple[Expr, ...]) -> Expr:
        """See `Isa.dot`: a chain of one, of levels in 7 bits."""
        pairs = self.narrow(None, levels, activations, Feed(0, ends=(0, LARGEST)))
        return sums + self.widened(pairs, v.full(1, "int16", vpmaddubsw.LANES))
