"""Stage 4: edits of the float graph that make it easier to quantize. One file an equalizer."""
