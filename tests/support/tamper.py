"""Ways to damage a bundle, each of which both runtimes must refuse with exit code 8."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = ("manifest.json", "module.so", "weights.safetensors", "report.json", "lib/extra.so")


def cut(name: str, keep: float) -> Callable[[Path], None]:
    """Keep only the first part of a file."""

    def apply(bundle: Path) -> None:
        path = bundle / name
        os.truncate(path, int(path.stat().st_size * keep))

    return apply


def flip(name: str, where: float) -> Callable[[Path], None]:
    """Change one bit."""

    def apply(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[int((len(data) - 1) * where)] ^= 4
        (bundle / name).write_bytes(data)

    return apply


def grow(name: str) -> Callable[[Path], None]:
    """Append one byte."""

    def apply(bundle: Path) -> None:
        with (bundle / name).open("ab") as file:
            file.write(b"\0")

    return apply


def remove(name: str) -> Callable[[Path], None]:
    """Delete a file."""
    return lambda bundle: (bundle / name).unlink()


def link(name: str) -> Callable[[Path], None]:
    """Replace a file by a symbolic link to the same bytes."""

    def apply(bundle: Path) -> None:
        elsewhere = bundle.parent / "elsewhere"
        (bundle / name).rename(elsewhere)
        (bundle / name).symlink_to(elsewhere)

    return apply


def fifo(name: str) -> Callable[[Path], None]:
    """Replace a file by a FIFO, which hangs whoever opens it carelessly."""

    def apply(bundle: Path) -> None:
        (bundle / name).unlink()
        os.mkfifo(bundle / name)

    return apply


def folder(name: str) -> Callable[[Path], None]:
    """Replace a file by a folder."""

    def apply(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).mkdir()

    return apply


def add(name: str) -> Callable[[Path], None]:
    """Add a file that the manifest does not list."""

    def apply(bundle: Path) -> None:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(b"x")

    return apply


def link_folder(bundle: Path) -> None:
    """Replace a folder of the bundle by a link to a folder with the same files."""
    elsewhere = bundle.parent / "elsewhere"
    (bundle / "lib").rename(elsewhere)
    (bundle / "lib").symlink_to(elsewhere)


def forge(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Edit the manifest and give it a right hash of its own."""

    def apply(bundle: Path) -> None:
        raw = json.loads((bundle / "manifest.json").read_text())
        change(raw)
        raw.pop("manifest_sha256", None)
        raw["manifest_sha256"] = "0" * 64
        text = json.dumps(raw)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (bundle / "manifest.json").write_text(text.replace("0" * 64, digest))

    return apply


def list_file(name: str) -> Callable[[Path], None]:
    """List a path in the manifest; the file behind it exists and has the size and hash that are listed."""
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}

    def apply(bundle: Path) -> None:
        (bundle.parent / "outside").write_bytes(b"x")
        (bundle / ".hidden").write_bytes(b"x")
        forge(lambda raw: raw["files"].update({name.format(parent=bundle.parent): entry}))(bundle)

    return apply


def parameter(**change: Any) -> Callable[[Path], None]:
    """Say something else about the first weight."""
    return forge(lambda raw: raw["parameters"][0].update(change))


def variant(**change: Any) -> Callable[[Path], None]:
    """Say something else about the first variant."""
    return forge(lambda raw: raw["variants"][0].update(change))


WAYS: dict[str, Callable[[Path], None]] = {
    **{f"half of {name}": cut(name, 0.5) for name in FILES},
    **{f"nothing of {name}": cut(name, 0) for name in FILES},
    **{f"bit in {name} at {at}": flip(name, at) for name in FILES for at in (0, 0.5, 1)},
    **{f"longer {name}": grow(name) for name in FILES},
    **{f"no {name}": remove(name) for name in FILES},
    **{f"link for {name}": link(name) for name in FILES},
    **{f"fifo for {name}": fifo(name) for name in FILES},
    **{f"folder for {name}": folder(name) for name in FILES},
    **{f"added {name}": add(name) for name in ("extra", ".hidden", "lib/evil.so", "new/evil.so", "module.so.bak")},
    "link for lib": link_folder,
    "schema version 1": forge(lambda raw: raw.update(schema_version=1)),
    "no schema version": forge(lambda raw: raw.pop("schema_version")),
    "another tvm": forge(lambda raw: raw.update(tvm_version="0.26.0")),
    "another machine": forge(lambda raw: raw["target"].update(machine="riscv64")),
    "unknown feature": variant(cpu_features=["quantum"]),
    "features as text": variant(cpu_features="avx2"),
    "library that is not listed": variant(library="other.so"),
    "library outside": variant(library="../outside"),
    "argument that is none": variant(arguments=[0, 2]),
    "argument before the first": variant(arguments=[0, -1]),
    "no variants": forge(lambda raw: raw.update(variants=[])),
    "unknown device": forge(lambda raw: raw["target"].update(device="tpu")),
    "no weights listed": forge(lambda raw: raw["files"].pop("weights.safetensors")),
    "list as manifest": lambda bundle: (bundle / "manifest.json").write_text("[]") and None,
    "deep manifest": lambda bundle: (bundle / "manifest.json").write_text("[" * 1_000_000) and None,
    **{f"path {name}": list_file(name) for name in ("../outside", "{parent}/outside", "lib/../../outside", ".hidden")},
    "unknown tensor": parameter(tensor="nothing"),
    "larger tensor": parameter(shape=[8, 17]),
    "huge tensor": parameter(shape=[2**40, 2**40]),
    "negative tensor": parameter(shape=[-8, 16]),
    "wide tensor": parameter(dtype="float64"),
    "unknown dtype": parameter(dtype="float31"),
}
