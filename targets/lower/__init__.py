"""Lowering: from the canonical ONNX graph to a relax module, one file an operator family under `ops`."""
