"""The ONNX graph: what operators mean to kbitc, editing, legality, reference runs."""
