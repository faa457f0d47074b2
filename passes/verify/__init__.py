"""Stage 8: how close the quantized model, and the compiled module, are to the original."""
