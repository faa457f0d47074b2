"""Refuses names that are no text: protobuf hands such strings out as bytes, and libraries stumble over them."""

from __future__ import annotations

from typing import Any

import onnx

from kbitc.errors import ModelError


def check_text(proto: onnx.ModelProto) -> None:
    """Check that every string of the message is UTF-8.

    Raises:
        ModelError: names the field and shows the bytes.
    """
    rest: list[Any] = [proto]
    while rest:
        message = rest.pop()
        for field, value in _fields(message):
            for item in [value] if isinstance(value, str | bytes) or not _is_list(value) else value:
                if field.type == field.TYPE_STRING and not isinstance(item, str):
                    raise ModelError(
                        "the file holds a string that is not UTF-8",
                        where=f"{field.containing_type.name}.{field.name}",
                        got=repr(bytes(item[:40])),
                        remedy="the file is damaged: export the model again",
                    )
                if field.type == field.TYPE_MESSAGE:
                    rest.append(item)


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _fields(message: Any) -> list[tuple[Any, Any]]:
    """The fields that are set; of a tensor only its texts, since asking for its data would copy them."""
    if not isinstance(message, onnx.TensorProto):
        return list(message.ListFields())
    named = message.DESCRIPTOR.fields_by_name
    found: list[tuple[Any, Any]] = [(named["name"], message.name), (named["doc_string"], message.doc_string)]
    return [*found, (named["external_data"], message.external_data)]
