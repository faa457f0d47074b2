"""Kernels for NVIDIA GPUs, written as TIR with bound threads."""
