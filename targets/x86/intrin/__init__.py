"""One file an AVX2 or AVX-512 instruction, with its numpy meaning, and the instruction sets made of them."""
