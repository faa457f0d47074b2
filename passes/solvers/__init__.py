"""One file a solver: `solve(weight, scheme, inputs=None) -> QTensor`. Numpy only.

`inputs` are moments of what the weight is multiplied with, None without data. `kbitc.catalog` finds a solver by its
file name; files that begin with an underscore are shared by solvers.
"""
