"""Lines of ONNX text that several functions share, most of them of integers.

A function takes a part's result by the name it asks for; the part prefixes its own names with that name, so that
parts do not clash. Numbers are int64 unless said otherwise.
"""

from __future__ import annotations

#: ONNX types: (signed, unsigned, exponent of the offset that makes a number positive before a shift).
_TYPES = {64: (7, 13, 62), 32: (6, 12, 30)}
#: Newton's steps that bring a start of at most twice the root to the root, for numbers below 2^62.
NEWTON_STEPS = 6
#: Base-4 digits of numbers below 2^62.
DIGITS = 31

#: which: the block of every channel, from shape [N, T, C] and the attribute `block`.
BLOCK_OF_CHANNEL = """
    two = Constant<value_ints = [2]>()
    three = Constant<value_ints = [3]>()
    start = Constant<value_int = 0>()
    step = Constant<value_int = 1>()
    channels1 = Slice(shape, two, three)
    channels = Squeeze(channels1)
    index = Range(start, channels, step)
    block0 = Constant<value_int: int = @block>()
    which = Div(index, block0)
"""


def function(signature: str, *parts: str) -> str:
    """The text of a function; {opset} is left open. signature: `Name <attributes> (inputs)`, its result is Y."""
    lines = "\n".join(f"    {line.strip()}" for part in parts for line in part.strip().splitlines())
    return f'<domain: "kbitc", opset_import: ["" : {{opset}}]>\n{signature} => (Y) {{{{\n{lines}\n}}}}'


def shifted(source: str, shift: str, made: str, width: int = 64) -> str:
    """made = floor((source + 2^(shift - 1)) / 2^shift): halves go up.

    ONNX shifts unsigned numbers only, so an offset makes the sum positive; its own shift is subtracted again.

    Args:
        source: |source| <= 2^62 (2^30 with a width of 32).
        shift: an integer of any type, 1 .. 62 (30).
        made: name of the result.
        width: bits of the numbers, 64 or 32.
    """
    signed, unsigned, exponent = _TYPES[width]
    return f"""
        {made}_offset0 = Constant<value_int = {1 << exponent}>()
        {made}_offset = Cast<to = {signed}>({made}_offset0)
        {made}_raised = Add({source}, {made}_offset)
        {made}_positive = Cast<to = {unsigned}>({made}_raised)
        {shifted_positive(f"{made}_positive", shift, f"{made}_down", width).strip()}
        {made}_down1 = Cast<to = {signed}>({made}_down)
        {made}_lift = Cast<to = {unsigned}>({made}_offset)
        {made}_lift1 = BitShift<direction = "RIGHT">({made}_lift, {made}_down_shift)
        {made}_lift2 = Cast<to = {signed}>({made}_lift1)
        {made} = Sub({made}_down1, {made}_lift2)"""


def shifted_positive(source: str, shift: str, made: str, width: int = 64) -> str:
    """The same of an unsigned number below 2^63 (2^31 with a width of 32); made is unsigned too."""
    unsigned = _TYPES[width][1]
    return f"""
        {made}_unit0 = Constant<value_int = 1>()
        {made}_unit = Cast<to = {unsigned}>({made}_unit0)
        {made}_shift = Cast<to = {unsigned}>({shift})
        {made}_less = Sub({made}_shift, {made}_unit)
        {made}_half = BitShift<direction = "LEFT">({made}_unit, {made}_less)
        {made}_rounded = Add({source}, {made}_half)
        {made} = BitShift<direction = "RIGHT">({made}_rounded, {made}_shift)"""


def divided(source: str, divisor: str, made: str) -> str:
    """made = floor((2 source + divisor) / (2 divisor)), the nearest integer to the quotient, halves up.

    Div of ONNX cuts towards zero: a negative remainder takes one off.

    Args:
        source: |source| < 2^62 - divisor / 2.
        divisor: 1 .. 2^61.
        made: name of the result.
    """
    return f"""
        {made}_two = Constant<value_int = 2>()
        {made}_one = Constant<value_int = 1>()
        {made}_zero = Constant<value_int = 0>()
        {made}_source2 = Mul({source}, {made}_two)
        {made}_number = Add({made}_source2, {divisor})
        {made}_below = Mul({divisor}, {made}_two)
        {made}_cut = Div({made}_number, {made}_below)
        {made}_whole = Mul({made}_cut, {made}_below)
        {made}_rest = Sub({made}_number, {made}_whole)
        {made}_negative = Less({made}_rest, {made}_zero)
        {made}_less = Where({made}_negative, {made}_one, {made}_zero)
        {made} = Sub({made}_cut, {made}_less)"""


def limited(source: str, low: str, high: str, made: str) -> str:
    """made = min(max(source, low), high)."""
    return f"""
        {made}_is_low = Less({source}, {low})
        {made}_floored = Where({made}_is_low, {low}, {source})
        {made}_is_high = Less({high}, {made}_floored)
        {made} = Where({made}_is_high, {high}, {made}_floored)"""


def rooted(source: str, made: str) -> str:
    """made = floor(sqrt(source)) by Newton's steps from a power of two above it; then one less where it is too large.

    source: 1 .. 2^62 - 1, its last axis has one element.
    """
    lines = [
        f"{made}_last = Constant<value_ints = [-1]>()",
        f"{made}_two = Constant<value_int = 2>()",
        f"{made}_thresholds = Constant<value_ints = [{', '.join(str(4**digit) for digit in range(DIGITS))}]>()",
        f"{made}_reached = GreaterOrEqual({source}, {made}_thresholds)",
        f"{made}_reached1 = Cast<to = 13>({made}_reached)",
        f"{made}_reached2 = Cast<to = 7>({made}_reached1)",
        f"{made}_digits = ReduceSum<keepdims = 1>({made}_reached2, {made}_last)",
        f"{made}_digits1 = Cast<to = 13>({made}_digits)",
        f"{made}_unit0 = Constant<value_int = 1>()",
        f"{made}_unit = Cast<to = 13>({made}_unit0)",
        f'{made}_start = BitShift<direction = "LEFT">({made}_unit, {made}_digits1)',
        f"{made}_root0 = Cast<to = 7>({made}_start)",
    ]
    for step in range(NEWTON_STEPS):
        lines += [
            f"{made}_quotient{step} = Div({source}, {made}_root{step})",
            f"{made}_total{step} = Add({made}_root{step}, {made}_quotient{step})",
            f"{made}_root{step + 1} = Div({made}_total{step}, {made}_two)",
        ]
    return "\n".join([
        *lines,
        f"{made}_over = Mul({made}_root{NEWTON_STEPS}, {made}_root{NEWTON_STEPS})",
        f"{made}_is_over = Less({source}, {made}_over)",
        f"{made}_excess = Cast<to = 7>({made}_is_over)",
        f"{made} = Sub({made}_root{NEWTON_STEPS}, {made}_excess)",
    ])  # fmt: skip


#: product i64 = acc times multiplier, with multiplier and shift1 in the shape of channels along @axis.
PER_CHANNEL = """
    one = Constant<value_ints = [1]>()
    minus = Constant<value_ints = [-1]>()
    end = Constant<value_ints = [1000]>()
    axis0 = Constant<value_int: int = @axis>()
    after = Add(axis0, one)
    dims = Shape(acc)
    behind = Slice(dims, after, end)
    behind_rank = Shape(behind)
    ones = ConstantOfShape<value = int64[1] {{1}}>(behind_rank)
    channel_shape = Concat<axis = 0>(minus, ones)
    multiplier1 = Reshape(multiplier, channel_shape)
    shift1 = Reshape(shift, channel_shape)
    wide = Cast<to = 7>(acc)
    multiplier2 = Cast<to = 7>(multiplier1)
    product = Mul(wide, multiplier2)"""
#: The attributes of the same names as int64 scalars.
LIMITS = """
    low = Constant<value_int: int = @low>()
    high = Constant<value_int: int = @high>()"""
