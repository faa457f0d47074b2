"""One file an instruction of the GPU: how a kernel writes it, and what it means in numpy."""
