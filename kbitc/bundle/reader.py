"""Opens a bundle and refuses it, before anything is mapped or loaded, unless every file is exactly what was written."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kbitc.bundle.manifest import MAX_MANIFEST_BYTES, NAME, FileEntry, Manifest, Variant, parse_manifest
from kbitc.errors import BundleError
from kbitc.targets.target import machine_runs

VARIANT = "KBITC_VARIANT"
COPY_AGAIN = "copy the bundle again or compile the model again"


@dataclass(frozen=True)
class OpenBundle:
    """A bundle on disk whose manifest has been read: its folder and the manifest."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies."""
        return self.folder / name


def open_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> OpenBundle:
    """Read the manifest of a bundle and check every file against it.

    Args:
        path: the folder NAME.kbit.
        verify: also compare the SHA-256 of every file; the list of files and their sizes are always compared.

    Raises:
        BundleError: when the folder is not a bundle, or a file is missing, extra, a link, of another size or changed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_list(folder, manifest)
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry, verify)
    return OpenBundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle; no other file is looked at.

    Raises:
        BundleError: when there is none or it is damaged.
    """
    if not folder.is_dir():
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise BundleError(f"the bundle {what}", where=str(folder), remedy="give the folder NAME.kbit")
    try:
        descriptor = _open_regular(folder / NAME)
    except BundleError as error:
        if not os.path.lexists(folder / NAME):
            raise BundleError(
                f"not a bundle: {NAME} is missing", where=str(folder), remedy="give the folder NAME.kbit"
            ) from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{NAME} is too large", where=str(folder), got=f"more than {MAX_MANIFEST_BYTES} bytes")
    return parse_manifest(data, str(folder))


def constants_of(folder: Path) -> tuple[str, ...]:
    """The NAME=NUMBER texts with which inputs of the model were made constants when the bundle was compiled."""
    options = read_manifest(folder).provenance.get("options")
    return tuple(map(str, options.get("constants", ()))) if isinstance(options, Mapping) else ()


def choose_variant(manifest: Manifest, where: str, wanted: str | None = None) -> Variant:
    """The first variant that this machine runs.

    Args:
        manifest: of the bundle.
        where: the bundle, for messages.
        wanted: the only variant that will do, such as "avx2"; None asks the environment variable `VARIANT`, and when
            that is empty too any will do.

    Raises:
        BundleError: the bundle has no such variant, or this machine runs none; names both sides.
    """
    wanted = wanted or os.environ.get(VARIANT)
    variants = [item for item in manifest.variants if not wanted or wanted in (item.name, item.target)]
    if not variants:
        there = ", ".join(item.name for item in manifest.variants)
        raise BundleError("the bundle has no such variant", where=where, got=wanted, remedy=f"it has {there}")
    target, reason = manifest.target, ""
    for variant in variants:
        refusal = machine_runs(variant.target, target.machine, variant.cpu_features, target.device, target.arch)
        if refusal is None:
            return variant
        reason = refusal
    what = "this machine cannot run the variant" if wanted else "this bundle is for another machine"
    raise BundleError(what, where=where, got=reason, remedy="compile with --target host")


def check_runtime(manifest: Manifest, where: str) -> None:
    """Refuse a bundle for another version of TVM's runtime.

    Raises:
        BundleError: names both sides.
    """
    installed = tvm_version()
    if manifest.tvm_version != installed:
        raise BundleError(
            f"this bundle needs the runtime of apache-tvm {manifest.tvm_version}",
            where=where,
            got=f"apache-tvm {installed}",
            remedy="compile the model again, or install that version",
        )


def tvm_version() -> str:
    """Version of the installed apache-tvm; tvm is not imported.

    Raises:
        BundleError: when it is not installed.
    """
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError as error:
        raise BundleError("no TVM runtime is installed", remedy="pip install apache-tvm") from error


def _check_list(folder: Path, manifest: Manifest) -> None:
    """The files on disk and the files in the manifest must be the same."""
    expected = set(manifest.files) | {NAME}
    folders = {parent.as_posix() for name in expected for parent in Path(name).parents} - {"."}
    found: set[str] = set()
    for root, directories, files in os.walk(folder):
        base = Path(root)
        for name in directories + files:
            path = base / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise BundleError("a file of the bundle is a link", where=str(path), remedy=COPY_AGAIN)
            if relative not in (folders if name in directories else expected):
                raise BundleError(
                    "the bundle holds a file that its manifest does not list", where=str(path), remedy="remove it"
                )
            found.add(relative)
    if missing := sorted(expected - found):
        raise BundleError("a file of the bundle is missing", where=str(folder / missing[0]), remedy=COPY_AGAIN)


def _check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    descriptor = _open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise BundleError(
                "a file of the bundle has the wrong size",
                where=str(path),
                got=f"{size} bytes instead of {entry.size}",
                remedy=COPY_AGAIN,
            )
        if verify and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise BundleError(
                "a file of the bundle was changed or is damaged: its SHA-256 differs",
                where=str(path),
                remedy=COPY_AGAIN,
            )


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file that is not a link; a FIFO or device is refused without blocking."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(
            "a file of the bundle cannot be read (missing, a link, or no permission)",
            where=str(path),
            got=error.strerror,
            remedy=COPY_AGAIN,
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError("a file of the bundle is not a regular file", where=str(path), remedy=COPY_AGAIN)
    return descriptor
