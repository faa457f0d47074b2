"""What `kbitc analyze` measures: where the accuracy of a quantized model goes, layer by layer."""
