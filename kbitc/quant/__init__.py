"""Quantization: schemes, data types, quantized tensors and how they are packed."""
