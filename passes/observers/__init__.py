"""Observers: from the statistics of a value to the range that its codes cover. One file an observer.

Each has `observe(stats, levels) -> (low, high)`: `levels` is the number of codes; the range need not hold zero, the
caller widens it. They see numbers only.
"""
