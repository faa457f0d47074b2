"""One file a form that `kbitc quantize --format` can write, found by its name.

Each defines ``declines(widen, op_type, activation, scheme) -> reason | None``, which the plan asks before it decides,
and ``write(export, path) -> bytes written``. What is written means what the quantized ONNX model of kbitc means.
"""
