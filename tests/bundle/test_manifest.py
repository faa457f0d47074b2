from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kbitc.bundle.manifest import FileEntry, Manifest, Parameter, TargetFacts, ValueInfo, Variant, parse_manifest
from kbitc.errors import BundleError

HASH = "0123456789abcdef" * 4
MANIFEST = Manifest(
    kbitc_version="0.1.0",
    tvm_version="0.27",
    target=TargetFacts("x86:avx2", "x86_64", "x86_64-linux-gnu", "cpu"),
    variants=(Variant("x86:avx2", "module.so", ("avx2", "fma"), (0,)),),
    inputs=(ValueInfo("x:0", "float32", ("batch", 3, 0)), ValueInfo("größe", "int64", ())),
    outputs=(ValueInfo("y", "bool", ("batch",)),),
    parameters=(Parameter("w", "uint8", (2, 3), "w"),),
    files={name: FileEntry(HASH, 7) for name in ("module.so", "weights.safetensors", "lib/a-b_c.so.1")},
    plan={"w": {"scheme": "int4:b32"}},
    accuracy={"y": {"sqnr": 31.5, "top1": None}},
    provenance={"model_sha256": HASH},
)


def test_reads_back_what_was_written() -> None:
    assert parse_manifest(MANIFEST.to_bytes(), "here") == MANIFEST


def test_bytes_do_not_depend_on_the_order_of_files() -> None:
    turned = replace(MANIFEST, files=dict(reversed(MANIFEST.files.items())))
    assert turned.to_bytes() == MANIFEST.to_bytes()


def test_numpy_scalars_become_numbers() -> None:
    read = parse_manifest(replace(MANIFEST, accuracy={"sqnr": np.float32(1.5)}).to_bytes(), "here")
    assert read.accuracy == {"sqnr": 1.5}


def test_every_flipped_bit_is_noticed() -> None:
    data = MANIFEST.to_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BundleError):
            parse_manifest(bytes(changed), "here")


def test_every_truncation_is_noticed() -> None:
    data = MANIFEST.to_bytes()
    for length in range(len(data)):
        with pytest.raises(BundleError):
            parse_manifest(data[:length], "here")


def forge(**changes: Any) -> bytes:
    """A manifest with other fields and a right hash of its own."""
    raw = json.loads(MANIFEST.to_bytes()) | changes
    raw["manifest_sha256"] = "0" * 64
    text = json.dumps(raw)
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()).encode()


def test_forging_works() -> None:
    assert parse_manifest(forge(kbitc_version="9"), "here").kbitc_version == "9"


@pytest.mark.parametrize("version", [0, 1, 99])
def test_another_schema_version_is_named_before_anything_else(version: int) -> None:
    data = MANIFEST.to_bytes().replace(b'"schema_version": 2', b'"schema_version": %d' % version)
    with pytest.raises(BundleError, match=f"schema version 2 .*got version {version}"):
        parse_manifest(data, "here")


@pytest.mark.parametrize(
    "path",
    [
        *("../evil", "a/../evil", "/etc/passwd", "a//b", "a/", "", ".", "./a", ".hidden", "a/.hidden", "-rf"),
        *("a\\b", "a\nb", "a\0b", "c:evil", "a b", "manifest.json", "ä"),
    ],
)
def test_paths_that_leave_the_bundle_are_refused(path: str) -> None:
    files = {**json.loads(MANIFEST.to_bytes())["files"], path: {"sha256": HASH, "size": 1}}
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        parse_manifest(forge(files=files), "here")


VARIANT = {"target": "x86:avx2", "library": "module.so", "cpu_features": [], "arguments": [0]}
ENTRY = {"sha256": HASH, "size": 1}
NEEDED = {"module.so": ENTRY, "weights.safetensors": ENTRY}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "1"}, "schema_version is not a number"),
        ({"schema_version": True}, "schema_version is not a number"),
        ({"tvm_version": None}, "tvm_version is not a text"),
        ({"files": []}, "files is not a table"),
        ({"files": {"module.so": ENTRY}}, "a needed file is not listed .*weights"),
        ({"files": NEEDED | {"a": {"sha256": HASH.upper(), "size": 1}}}, "not a SHA-256"),
        ({"files": NEEDED | {"a": {"sha256": HASH, "size": -1}}}, "size is not a number"),
        ({"inputs": {}}, "inputs is not a list"),
        ({"inputs": [{"name": "x", "dtype": "float31", "shape": []}]}, "unknown dtype"),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": [1.5]}]}, "not a dimension"),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": [""]}]}, "not a dimension"),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": [-1]}]}, "not a dimension"),
        ({"parameters": [{"name": "w", "dtype": "int8", "shape": ["n"], "tensor": "w"}]}, "not a dimension"),
        ({"parameters": [{"name": "w\0", "dtype": "int8", "shape": [], "tensor": "w"}]}, "name is not a text"),
        ({"target": {"name": "x"}}, "machine is not a text"),
        ({"variants": []}, "variants is empty"),
        ({"variants": [VARIANT | {"cpu_features": [1]}]}, "cpu_features is not a list of texts"),
        ({"variants": [VARIANT | {"library": "none.so"}]}, "a needed file is not listed .*none.so"),
        ({"variants": [VARIANT | {"arguments": [1]}]}, "not a place in parameters"),
        ({"variants": [VARIANT | {"arguments": [True]}]}, "not a place in parameters"),
        ({"plan": []}, "plan is not a table"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_manifest(forge(**changes), "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b'{"a":1,"a":2}'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(data, "here")
