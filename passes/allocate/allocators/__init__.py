"""One file an allocator, found by its name for `--allocate`.

Each defines ``make(problem) -> Allocate``. Making one may take long (it measures); the function that it gives is called
with (sizes, limit) as often as a budget has to be tried, and answers None when nothing fits.
"""
