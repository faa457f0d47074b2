"""What `manifest.json` holds: the facts of a bundle, checked when they are read.

The file ends with its own SHA-256 (computed with the 64 digits set to 0), so damage to it is noticed as damage to any
other file is. This guards against accidents, not against someone who rewrites the bundle and its hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from kbitc.errors import BundleError

SCHEMA_VERSION = 2
NAME = "manifest.json"
LIBRARY = "module.so"
WEIGHTS = "weights.safetensors"
REPORT = "report.json"
QUANTIZED = "quantized.onnx"
MAX_MANIFEST_BYTES = 64 << 20
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
_SELF_KEY = '"manifest_sha256": "'
_ZEROS = "0" * 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
# No leading dot or dash: neither "..", nor hidden files, nor what a shell takes for an option.
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")


class Described(Protocol):
    """Whatever says name, dtype and shape of an input or output, as the lowering's signatures do."""

    @property
    def name(self) -> str:
        """Name of the input or output."""

    @property
    def dtype(self) -> str:
        """Numpy dtype name."""

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Dims; a text is a symbolic dim."""


@dataclass(frozen=True)
class ValueInfo:
    """An input or output: name, numpy dtype name, and dims (a number, or the name of a symbolic dim)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Parameter:
    """A weight: its true shape, and the name of its tensor in weights.safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: str


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (64 lower-case hex digits) and size in bytes of a file of the bundle."""

    sha256: str
    size: int


@dataclass(frozen=True)
class TargetFacts:
    """The machine a bundle is for; field meanings as in `kbitc.targets.target.Target`."""

    name: str
    machine: str
    triple: str
    device: str
    arch: str = ""


@dataclass(frozen=True)
class Variant:
    """The model compiled for one kind of processor.

    Attributes:
        target: text form of the target, such as ``x86:avx2``.
        library: the compiled library, a path in the bundle; variants with the same kernels share one.
        cpu_features: processor features (names of /proc/cpuinfo) without which it must not be loaded.
        arguments: what `main` takes behind the inputs: places in the manifest's `parameters`.
    """

    target: str
    library: str
    cpu_features: tuple[str, ...]
    arguments: tuple[int, ...]

    @property
    def name(self) -> str:
        """What a person calls it, such as ``avx2``: the target behind the colon."""
        return self.target.partition(":")[2] or self.target


@dataclass(frozen=True)
class Manifest:
    """Everything that a bundle says about itself.

    Attributes:
        kbitc_version: version of kbitc that wrote it.
        tvm_version: version of apache-tvm whose runtime it needs, exactly.
        target: the machine it is for.
        inputs: inputs of the model, in the order of `main`.
        outputs: outputs, in order.
        variants: the compiled model for each kind of processor, the most demanding first.
        parameters: weights of all variants; what several read alike is there once.
        files: relative path -> hash and size of every file but the manifest.
        plan: what each weight became (scheme, padding), for people and tools.
        accuracy: how close the result is to the original, as verified before the bundle was written.
        provenance: model hash, command and versions. No time, so that equal inputs give equal bytes.
    """

    kbitc_version: str
    tvm_version: str
    target: TargetFacts
    variants: tuple[Variant, ...]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    parameters: tuple[Parameter, ...]
    files: Mapping[str, FileEntry]
    plan: Mapping[str, Any] = field(default_factory=dict)
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def parameters_of(self, variant: Variant) -> tuple[Parameter, ...]:
        """The weights of a variant, in the order of its `main` after the inputs."""
        return tuple(self.parameters[place] for place in variant.arguments)

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json; the same manifest gives the same bytes."""
        fields = asdict(self)
        ordered = {"schema_version": fields.pop("schema_version"), **fields, "manifest_sha256": _ZEROS}
        ordered["files"] = {path: asdict(self.files[path]) for path in sorted(self.files)}
        text = json.dumps(ordered, indent=1, allow_nan=False, default=_plain) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        head, found, tail = text.rpartition(_SELF_KEY + _ZEROS)
        return (head + found.replace(_ZEROS, digest) + tail).encode()


def _plain(value: object) -> object:
    """JSON form of numpy scalars and other values that say what they are by `item` or `str`."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read manifest.json back.

    Args:
        data: the bytes of the file.
        where: the bundle, for messages.

    Raises:
        BundleError: when it is damaged, of another schema version, or not a manifest.
    """
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{NAME} is damaged", where=where, got=str(error)[:200]) from error
    reader = _Reader(where)
    top = reader.table(raw, NAME)
    version = reader.number(top, "schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"this kbitc reads bundles of schema version {SCHEMA_VERSION}",
            where=where,
            got=f"version {version}",
            remedy="compile the model again, or use the kbitc that wrote it",
        )
    _check_self_hash(data, where)
    return reader.manifest(top)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _check_self_hash(data: bytes, where: str) -> None:
    head, found, tail = data.rpartition(_SELF_KEY.encode())
    given = tail[:64]
    digest = hashlib.sha256(head + found + _ZEROS.encode() + tail[64:]).hexdigest()
    if not found or given != digest.encode():
        raise BundleError(f"{NAME} was changed or is damaged: its own SHA-256 differs", where=where)


@dataclass(frozen=True)
class _Reader:
    """Takes typed values out of parsed JSON; what has the wrong type is a BundleError that names it."""

    where: str

    def fail(self, what: str, got: object) -> BundleError:
        return BundleError(f"{NAME}: {what}", where=self.where, got=repr(got)[:120])

    def table(self, value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(f"{what} is not a table", value)
        return value

    def items(self, table: dict[str, Any], key: str) -> list[Any]:
        value = table.get(key)
        if not isinstance(value, list):
            raise self.fail(f"{key} is not a list", value)
        return value

    def text(self, table: dict[str, Any], key: str) -> str:
        value = table.get(key)
        if not isinstance(value, str) or "\0" in value:
            raise self.fail(f"{key} is not a text", value)
        return value

    def number(self, table: dict[str, Any], key: str) -> int:
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(f"{key} is not a number", value)
        return value

    def dtype(self, table: dict[str, Any]) -> str:
        value = self.text(table, "dtype")
        if value not in DTYPES:
            raise self.fail("unknown dtype", value)
        return value

    def dims(self, table: dict[str, Any], symbolic: bool) -> tuple[Any, ...]:
        dims = self.items(table, "shape")
        for dim in dims:
            whole = isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 2**62
            if not whole and not (symbolic and isinstance(dim, str) and dim):
                raise self.fail("not a dimension", dim)
        return tuple(dims)

    def value_info(self, raw: object) -> ValueInfo:
        table = self.table(raw, "an input or output")
        return ValueInfo(self.text(table, "name"), self.dtype(table), self.dims(table, symbolic=True))

    def parameter(self, raw: object) -> Parameter:
        table = self.table(raw, "a parameter")
        shape = self.dims(table, symbolic=False)
        return Parameter(self.text(table, "name"), self.dtype(table), shape, self.text(table, "tensor"))

    def target(self, raw: object) -> TargetFacts:
        table = self.table(raw, "target")
        name, machine, triple, device, arch = (
            self.text(table, key) for key in ("name", "machine", "triple", "device", "arch")
        )
        if device not in ("cpu", "cuda"):
            raise self.fail("unknown device", device)
        return TargetFacts(name, machine, triple, device, arch)

    def variant(self, raw: object, parameters: int, files: Mapping[str, FileEntry]) -> Variant:
        table = self.table(raw, "a variant")
        features = self.items(table, "cpu_features")
        if not all(isinstance(feature, str) for feature in features):
            raise self.fail("cpu_features is not a list of texts", features)
        arguments = self.items(table, "arguments")
        for place in arguments:
            if type(place) is not int or not 0 <= place < parameters:
                raise self.fail("not a place in parameters", place)
        library = self.text(table, "library")
        if library not in files:
            raise self.fail("a needed file is not listed", library)
        return Variant(self.text(table, "target"), library, tuple(features), tuple(arguments))

    def file_entry(self, path: str, raw: object) -> FileEntry:
        if not _PATH.fullmatch(path) or path == NAME:
            raise self.fail("not a path inside the bundle", path)
        table = self.table(raw, f"files[{path}]")
        sha256 = self.text(table, "sha256")
        if not _SHA256.fullmatch(sha256):
            raise self.fail(f"files[{path}]: not a SHA-256", sha256)
        return FileEntry(sha256, self.number(table, "size"))

    def manifest(self, top: dict[str, Any]) -> Manifest:
        files = {path: self.file_entry(path, raw) for path, raw in self.table(top.get("files"), "files").items()}
        if WEIGHTS not in files:
            raise self.fail("a needed file is not listed", WEIGHTS)
        parameters = tuple(map(self.parameter, self.items(top, "parameters")))
        variants = tuple(self.variant(raw, len(parameters), files) for raw in self.items(top, "variants"))
        if not variants:
            raise self.fail("variants is empty", [])
        return Manifest(
            kbitc_version=self.text(top, "kbitc_version"),
            tvm_version=self.text(top, "tvm_version"),
            target=self.target(top.get("target")),
            variants=variants,
            inputs=tuple(map(self.value_info, self.items(top, "inputs"))),
            outputs=tuple(map(self.value_info, self.items(top, "outputs"))),
            parameters=parameters,
            files=files,
            plan=self.table(top.get("plan"), "plan"),
            accuracy=self.table(top.get("accuracy"), "accuracy"),
            provenance=self.table(top.get("provenance"), "provenance"),
        )


def is_bundle_path(path: str) -> bool:
    """Whether a relative path may name a file of a bundle."""
    return _PATH.fullmatch(path) is not None and path != NAME
