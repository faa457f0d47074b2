"""One file a solver: `solve(weight, scheme) -> QTensor`. Numpy only; `kbitc.catalog` finds it by file name."""
