"""Generators of kernels in TIR: what is computed, apart from the rules that choose and place it."""
