"""Kernel and schedule rules of the CPU targets, one file a class of kernels."""
