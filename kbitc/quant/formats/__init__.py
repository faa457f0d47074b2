"""One file a data type; ``kbitc.catalog`` finds it by file name.

Each defines ``make(bits) -> Format``. A type with variants also defines ``variants(bits) -> tuple[str, ...]``, the
default first, and ``make(bits, variant)``. A type whose levels are learned from the weight also defines
``fit(bits, ratio, importance) -> Format``; what `make` gives is then the first guess, whose outermost levels bound
those of every fit.
"""
