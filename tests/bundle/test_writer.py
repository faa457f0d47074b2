from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kbitc.bundle import writer
from kbitc.bundle.manifest import Manifest
from kbitc.bundle.reader import open_bundle
from kbitc.bundle.writer import check_output, stage
from kbitc.errors import InternalError, ResourceError, UsageError
from tests.support import tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_holds_what_was_given(bundle: Path, compiled: tiny.Tiny) -> None:
    manifest = open_bundle(bundle).manifest
    assert set(contents(bundle)) == set(manifest.files) | {"manifest.json"}
    assert (bundle / "module.so").read_bytes() == compiled.library
    assert manifest.inputs == tiny.INPUTS
    assert manifest.target.name == "reference"
    assert [(p.name, p.shape) for p in manifest.parameters] == [("w", (8, 16)), ("b", (16,))]
    assert os.access(bundle / "tool", os.X_OK)
    assert not os.access(bundle / "lib/extra.so", os.X_OK)
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny.kbit"]


def test_equal_inputs_give_equal_bytes(compiled: tiny.Tiny, tmp_path: Path) -> None:
    options = {"plan": {"w": "int4"}, "provenance": {"command": "x"}}
    first = compiled.write(tmp_path / "a.kbit", **options)
    second = compiled.write(tmp_path / "b.kbit", **options)
    assert contents(first) == contents(second)


def test_permissions_follow_the_umask(compiled: tiny.Tiny, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = compiled.write(tmp_path / "a.kbit")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o750
    assert (out / "module.so").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_a_failure_leaves_nothing_behind(compiled: tiny.Tiny, tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), stage(tmp_path / "a.kbit") as staging:
        staging.write_variants([compiled])
        assert len(list(tmp_path.iterdir())) == 1
        raise failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["to_bytes", "rename"])
def test_an_interrupt_while_committing_keeps_the_old_bundle(
    compiled: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = compiled.write(tmp_path / "a.kbit")
    before = contents(out)
    rename, calls = os.rename, []

    def interrupt_second(source: object, target: object) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)  # type: ignore[arg-type]

    def interrupt(self: Manifest) -> bytes:
        raise KeyboardInterrupt

    if moment == "rename":
        monkeypatch.setattr(os, "rename", interrupt_second)
    else:
        monkeypatch.setattr(Manifest, "to_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled.write(out, force=True, plan={"new": 1})
    monkeypatch.undo()
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.kbit"]


def test_a_full_disk_is_a_resource_error(compiled: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.weights_file, "write_weights", full)
    with pytest.raises(ResourceError, match="No space left"):
        compiled.write(tmp_path / "a.kbit")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_without_force(bundle: Path, compiled: tiny.Tiny) -> None:
    before = contents(bundle)
    with pytest.raises(UsageError, match="--force"):
        compiled.write(bundle)
    assert contents(bundle) == before
    compiled.write(bundle, force=True)
    assert set(contents(bundle)) == {"manifest.json", "module.so", "report.json", "weights.safetensors"}
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny.kbit"]


@pytest.mark.parametrize("kind", ["file", "folder", "link to a bundle", "dangling link"])
def test_force_never_replaces_what_is_not_a_bundle(
    bundle: Path, compiled: tiny.Tiny, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(bundle if kind == "link to a bundle" else tmp_path / "nowhere")
    before = contents(tmp_path)
    with pytest.raises(UsageError):
        compiled.write(out, force=True)
    assert contents(tmp_path) == before
    assert out.is_symlink() == ("link" in kind)


def test_a_damaged_bundle_can_be_replaced(bundle: Path, compiled: tiny.Tiny) -> None:
    (bundle / "manifest.json").write_text("{")
    compiled.write(bundle, force=True)
    open_bundle(bundle)


def test_an_output_without_a_parent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        check_output(tmp_path / "no" / "a.kbit", force=True)


def test_an_output_that_appears_meanwhile_is_not_overwritten(compiled: tiny.Tiny, tmp_path: Path) -> None:
    out = tmp_path / "a.kbit"
    with pytest.raises(UsageError, match="exists"), stage(out) as staging:
        staging.write_variants([compiled])
        out.write_text("mine")
        staging.commit(tiny.INPUTS, tiny.OUTPUTS, kbitc_version="0")
    assert contents(tmp_path) == {"a.kbit": b"mine"}


@pytest.mark.parametrize("name", ["../evil", "manifest.json", "/tmp/evil", ".hidden"])
def test_only_good_names_are_staged(tmp_path: Path, name: str) -> None:
    with pytest.raises(InternalError), stage(tmp_path / "a.kbit") as staging:
        staging.add_file(name, b"")


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    with pytest.raises(InternalError), stage(tmp_path / "a.kbit") as staging:
        staging.write_json("report.json", {})
        staging.write_json("report.json", {})


def test_a_manifest_that_cannot_be_read_back_is_not_written(compiled: tiny.Tiny, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="read back"), stage(tmp_path / "a.kbit") as staging:
        staging.write_variants([compiled])
        bad = tiny.ValueInfo("x", "bfloat16", (1,))
        staging.commit([bad], tiny.OUTPUTS, kbitc_version="0")
    assert list(tmp_path.iterdir()) == []
