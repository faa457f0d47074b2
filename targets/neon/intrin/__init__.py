"""One file a NEON instruction, with its numpy meaning, and the instruction set made of them."""
