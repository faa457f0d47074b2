"""Writes a bundle: everything goes to a hidden folder beside OUT, which is renamed to OUT once, or removed.

::

    with stage(out) as staging:
        staging.write_variants([Compiled(target, library, weights)])
        staging.write_json(REPORT, report)
        staging.commit(inputs, outputs, kbitc_version=version)

What is staged can be loaded by `runtime.load_parts` before it is committed, so what is verified is what is shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kbitc.bundle import weights as weights_file
from kbitc.bundle.manifest import (
    LIBRARY,
    NAME,
    REPORT,
    WEIGHTS,
    Described,
    FileEntry,
    Manifest,
    Parameter,
    TargetFacts,
    ValueInfo,
    Variant,
    is_bundle_path,
    parse_manifest,
)
from kbitc.bundle.reader import read_manifest, tvm_version
from kbitc.errors import BundleError, InternalError, ResourceError, UsageError
from kbitc.targets.target import Target, bundle_name

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Compiled:
    """A model compiled for one target.

    Attributes:
        target: what it was compiled for.
        library: bytes of the shared library.
        weights: arrays of main's parameters behind the inputs, in order; what several variants read is one object.
    """

    target: Target
    library: bytes
    weights: Mapping[str, npt.NDArray[Any]]


class Staging:
    """The folder in which a bundle is being written. Made by `stage`."""

    def __init__(self, folder: Path, out: Path, force: bool) -> None:
        self.folder = folder
        self.parameters: tuple[Parameter, ...] = ()
        self.variants: tuple[Variant, ...] = ()
        self._targets: tuple[Target, ...] = ()
        self._out = out
        self._old = folder.with_suffix(".old")
        self._force = force
        self._files: dict[str, FileEntry] = {}

    @property
    def weights(self) -> Path:
        """Where `write_variants` put the weights."""
        return self.folder / WEIGHTS

    def parameters_of(self, variant: Variant) -> tuple[Parameter, ...]:
        """The weights of a variant, in the order of its `main`."""
        return tuple(self.parameters[place] for place in variant.arguments)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file written so far, by relative path."""
        return {name: entry.size for name, entry in self._files.items()}

    def write_variants(self, made: Sequence[Compiled]) -> None:
        """Add libraries and weights, what several variants share once.

        Args:
            made: one item a variant; the first runs wherever another does.
        """
        libraries: dict[bytes, str] = {}
        weights: dict[str, npt.NDArray[Any]] = {}
        places: dict[tuple[str, int], int] = {}
        variants = []
        for item in made:
            if item.library not in libraries:
                name = LIBRARY if len(made) == 1 else f"module-{item.target.variant.replace(',', '-')}.so"
                libraries[item.library] = name
                self.add_file(name, item.library)
            for name, array in item.weights.items():
                if (name, id(array)) not in places:
                    places[name, id(array)] = len(weights)
                    weights[_fresh(name, item.target.variant, weights)] = array
            arguments = tuple(places[name, id(array)] for name, array in item.weights.items())
            features = tuple(sorted(item.target.cpu_features))
            variants.append(Variant(item.target.name, libraries[item.library], features, arguments))
        self._targets = tuple(item.target for item in made)
        self.variants = tuple(reversed(variants))
        self._claim(WEIGHTS)
        with _disk(self._out):
            self.parameters, self._files[WEIGHTS] = weights_file.write_weights(self.weights, weights)

    def write_json(self, name: str, value: object) -> None:
        """Add a JSON file, such as report.json."""
        self.add_file(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def add_file(self, name: str, content: bytes | Path, *, executable: bool = False) -> None:
        """Add a file under a relative path, from memory or copied from a file.

        Raises:
            InternalError: when the name is taken or no file of a bundle may have it.
        """
        self._claim(name)
        path = self.folder / name
        digest, size = hashlib.sha256(), 0
        with _disk(self._out):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                for piece in _chunks(content):
                    digest.update(piece)
                    size += file.write(piece)
            if executable:
                path.chmod(path.stat().st_mode | 0o111 & ~_umask())
        self._files[name] = FileEntry(digest.hexdigest(), size)

    def commit(
        self,
        inputs: Sequence[Described],
        outputs: Sequence[Described],
        *,
        kbitc_version: str,
        plan: Mapping[str, Any] | None = None,
        accuracy: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        accepts: Callable[[int], bool] | None = None,
    ) -> Manifest | None:
        """Write the manifest and rename the folder to OUT.

        Args:
            inputs: inputs of `main`, in order.
            outputs: outputs, in order.
            kbitc_version: version of this kbitc.
            plan: what each weight became, JSON values.
            accuracy: result of the verification, JSON values.
            provenance: model hash, command, versions, JSON values.
            accepts: asked with the bytes of all files together; when it answers False nothing is published.

        Returns:
            The manifest; None when the size was not accepted.

        Raises:
            UsageError: when OUT has come into being meanwhile and `force` was not given.
        """
        manifest = Manifest(
            kbitc_version=kbitc_version,
            tvm_version=tvm_version(),
            target=target_facts(self._targets),
            variants=self.variants,
            inputs=_value_infos(inputs),
            outputs=_value_infos(outputs),
            parameters=self.parameters,
            files=dict(self._files),
            plan=plan or {},
            accuracy=accuracy or {},
            provenance=provenance or {},
        )
        data = manifest.to_bytes()
        try:
            parse_manifest(data, str(self._out))
        except BundleError as error:
            raise InternalError("kbitc would write a manifest that it cannot read back", got=str(error)) from error
        if accepts is not None and not accepts(sum(self.sizes.values()) + len(data)):
            return None
        with _disk(self._out):
            (self.folder / NAME).write_bytes(data)
            self.folder.chmod(0o777 & ~_umask())
            self._publish()
        return manifest

    def _publish(self) -> None:
        """Rename the folder to OUT; an old bundle is moved aside first and comes back when that fails."""
        check_output(self._out, force=self._force)
        replaces = os.path.lexists(self._out)
        if replaces:
            os.rename(self._out, self._old)
        try:
            os.rename(self.folder, self._out)
        except BaseException:
            if replaces:
                os.rename(self._old, self._out)
            raise

    def remove_leftovers(self) -> None:
        """Remove what is left beside OUT: the unfinished folder, or the bundle that was replaced."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if os.path.lexists(self._out):
            shutil.rmtree(self._old, ignore_errors=True)

    def _claim(self, name: str) -> None:
        if not is_bundle_path(name) or name in self._files:
            raise InternalError("not a name for a new file of a bundle", got=repr(name))


def _value_infos(values: Sequence[Described]) -> tuple[ValueInfo, ...]:
    return tuple(ValueInfo(value.name, str(value.dtype), tuple(value.shape)) for value in values)


def _fresh(name: str, variant: str, taken: Container[str]) -> str:
    """A name for a weight that no other has: its own where it is free."""
    while name in taken:
        name = f"{name}@{variant}"
    return name


def target_facts(targets: Sequence[Target]) -> TargetFacts:
    """What a manifest says of its targets together."""
    first = targets[0]
    return TargetFacts(bundle_name(targets), first.machine, first.triple, first.device, first.arch)


def check_output(out: str | os.PathLike[str], *, force: bool) -> Path:
    """Refuse, before any work is done, an OUT that cannot be written.

    Args:
        out: the folder to create.
        force: allow OUT to be a bundle, which will be replaced; anything else is never replaced.

    Returns:
        OUT as a path.

    Raises:
        UsageError: when it exists, is a link, or has no parent folder.
    """
    path = Path(os.path.abspath(out))
    if path.is_symlink():
        raise UsageError("the output is a symbolic link", got=str(path), remedy="give the place it points to")
    if not path.parent.is_dir():
        raise UsageError("the folder of the output does not exist", got=str(path.parent), remedy="make it first")
    if not os.path.lexists(path):
        return path
    if not force:
        raise UsageError("the output exists", got=str(path), remedy="give --force to replace it, or another name")
    if not _is_bundle(path):
        raise UsageError(
            "the output exists and is not a bundle, so it is not replaced", got=str(path), remedy="give another name"
        )
    return path


def _is_bundle(path: Path) -> bool:
    """A folder with a manifest of any schema version, or a damaged one; an empty folder counts too."""
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        read_manifest(path)
    except BundleError:
        return (path / NAME).is_file() and (path / WEIGHTS).is_file()
    return True


@contextmanager
def stage(out: str | os.PathLike[str], *, force: bool = False) -> Iterator[Staging]:
    """A `Staging` for OUT; unless it is committed, everything is removed again, also on KeyboardInterrupt.

    Raises:
        UsageError: as `check_output`.
        ResourceError: when the disk is full or not writable.
    """
    path = check_output(out, force=force)
    with _disk(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    staging = Staging(folder, path, force)
    try:
        yield staging
    finally:
        staging.remove_leftovers()


def write_bundle(
    out: str | os.PathLike[str],
    made: Sequence[Compiled],
    inputs: Sequence[Described],
    outputs: Sequence[Described],
    *,
    kbitc_version: str,
    report: Mapping[str, Any],
    plan: Mapping[str, Any] | None = None,
    accuracy: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    runtime_files: Mapping[str, bytes | Path] | None = None,
    force: bool = False,
) -> Manifest | None:
    """Write a whole bundle at once; see `Staging.write_variants` and `Staging.commit` for the arguments.

    Args:
        runtime_files: what `kbitc.targets.runner.deploy.with_runtime` gives, for `--with-runtime`.
        report: becomes report.json.
    """
    with stage(out, force=force) as staging:
        staging.write_variants(made)
        staging.write_json(REPORT, report)
        for name, content in (runtime_files or {}).items():
            staging.add_file(name, content, executable="/" not in name)
        return staging.commit(
            inputs,
            outputs,
            kbitc_version=kbitc_version,
            plan=plan,
            accuracy=accuracy,
            provenance=provenance,
        )


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Turns a full or read-only disk into an error that says so."""
    try:
        yield
    except OSError as error:
        raise ResourceError("cannot write the bundle", where=str(out), got=error.strerror or str(error)) from error


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
