from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kbitc.bundle.reader import open_bundle, read_manifest
from kbitc.bundle.runtime import load
from kbitc.errors import BundleError
from kbitc.targets import machine
from tests.support import tamper, tiny


@pytest.mark.parametrize("way", tamper.WAYS, ids=str)
def test_a_damaged_bundle_is_refused(bundle: Path, way: str) -> None:
    tamper.WAYS[way](bundle)
    with pytest.raises(BundleError) as caught:
        load(bundle)
    assert caught.value.exit_code == 8
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", tamper.FILES)
def test_the_message_names_the_file(bundle: Path, name: str) -> None:
    tamper.flip(name, 0.5)(bundle)
    with pytest.raises(BundleError, match=f"{name}|manifest.json"):
        load(bundle)


def test_nothing_is_loaded_when_a_hash_differs(bundle: Path) -> None:
    """Half a library kills the process with SIGBUS when it is mapped, so this must stay an exception."""
    tamper.cut("module.so", 0.5)(bundle)
    code = f"from kbitc.bundle.runtime import load\ntry: load({str(bundle)!r})\nexcept Exception as e: print(type(e))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "<class 'kbitc.errors.BundleError'>\n")


def test_without_verification_sizes_are_still_checked(bundle: Path) -> None:
    tamper.flip("report.json", 0.5)(bundle)
    assert open_bundle(bundle, verify=False).manifest.tvm_version
    tamper.cut("module.so", 0.5)(bundle)
    with pytest.raises(BundleError, match="wrong size"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.kbit"
    if kind == "file":
        path.write_text("")
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match="give the folder NAME.kbit"):
        load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(bundle: Path) -> None:
    (bundle / "module.so").chmod(0)
    with pytest.raises(BundleError, match="permission"):
        load(bundle)


def test_a_copied_or_linked_bundle_loads(bundle: Path, tmp_path: Path) -> None:
    """A link *to* the folder is the user's business; hard links hold the same bytes."""
    shutil.copytree(bundle, tmp_path / "copy.kbit")
    (tmp_path / "link.kbit").symlink_to(bundle)
    shutil.copytree(bundle, tmp_path / "hard.kbit", copy_function=os.link)
    for name in ("copy.kbit", "link.kbit", "hard.kbit"):
        assert load(tmp_path / name).inputs == tiny.INPUTS


def test_another_machine_is_refused_naming_both_sides(compiled: tiny.Tiny, tmp_path: Path, monkeypatch) -> None:
    out = compiled.write(tmp_path / "a.kbit")
    here = machine.architecture()
    other = "aarch64" if here == "x86_64" else "x86_64"
    monkeypatch.setattr(machine, "architecture", lambda: other)
    with pytest.raises(BundleError, match=f"reference is for {here}, this machine is {other}"):
        load(out)


def test_missing_processor_features_are_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper.variant(target="x86:avx512vnni", cpu_features=["avx2", "avx512_vnni"])(bundle)
    monkeypatch.setattr(machine, "cpu_features", lambda: frozenset({"avx2"}))
    with pytest.raises(BundleError, match="x86:avx512vnni needs the processor features avx512_vnni"):
        load(bundle)


def test_any_machine_can_read_the_manifest(bundle: Path) -> None:
    tamper.forge(lambda raw: raw["target"].update(machine="riscv64"))(bundle)
    assert read_manifest(bundle).target.machine == "riscv64"
    assert open_bundle(bundle).manifest.target.machine == "riscv64"


def test_a_fifo_does_not_hang(bundle: Path) -> None:
    tamper.fifo("manifest.json")(bundle)
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            load(bundle)
        except BundleError as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert failures
