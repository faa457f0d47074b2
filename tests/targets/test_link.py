from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from kbitc.errors import InternalError, ResourceError
from kbitc.targets import link, machine
from kbitc.targets.link import Compiler, find_compiler, link_shared
from kbitc.targets.target import parse_target
from tests.support import tiny
from tests.support.qemu import need_runner

HERE = machine.architecture()
OTHER = "aarch64" if HERE == "x86_64" else "x86_64"


def elf_machine(path: Path) -> int:
    """e_machine of an ELF header: 62 is x86-64, 183 is AArch64."""
    data = path.read_bytes()
    assert data[:4] == b"\x7fELF"
    return int.from_bytes(data[18:20], "little")


@pytest.mark.parametrize("target", ["reference", "arm-neon:dotprod"])
def test_a_library_is_for_its_target_and_reproducible(target: str, tmp_path: Path) -> None:
    need_runner(target)
    library = tiny.compile_tiny(target).library
    tiny.compile_tiny.cache_clear()
    assert tiny.compile_tiny(target).library == library
    (tmp_path / "a.so").write_bytes(library)
    assert elf_machine(tmp_path / "a.so") == {"x86_64": 62, "aarch64": 183}[parse_target(target).machine]
    assert str(tmp_path.parent).encode() not in library
    assert b"/tmp/" not in library


def test_objects_become_a_library(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int answer(void) { return 42; }")
    compiler = find_compiler(HERE)
    compiler.run(["-x", "c", "-fPIC", "-c", tmp_path / "a.c", "-o", tmp_path / "a.o"], "an object")
    link_shared(tmp_path / "a.so", [tmp_path / "a.o"], HERE)
    assert ctypes.CDLL(str(tmp_path / "a.so")).answer() == 42


def test_a_failing_linker_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.o").write_text("no object")
    with pytest.raises(InternalError, match="could not make a shared library") as caught:
        link_shared(tmp_path / "a.so", [tmp_path / "a.o"], HERE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "package"), [(HERE, "apt-get install g\\+\\+"), (OTHER, "apt-get install g\\+\\+-")]
)
def test_without_a_compiler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, architecture: str, package: str
) -> None:
    monkeypatch.setattr(machine, "tool", lambda *names: None)
    monkeypatch.setattr(machine, "has_module", lambda name: False)
    with pytest.raises(ResourceError, match=f"{package}.*pip install ziglang"):
        find_compiler(architecture)


def test_zig_serves_every_architecture_when_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_module", lambda name: name == "ziglang")
    assert find_compiler(OTHER, prefer_zig=True).command[-1] == f"{OTHER}-linux-gnu.2.28"
    monkeypatch.setattr(machine, "tool", lambda *names: None)
    assert find_compiler(HERE).name == f"zig-{HERE}"


def test_the_system_compiler_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def tool(*names: str) -> str:
        asked.append(names)
        return f"/usr/bin/{names[0]}"

    monkeypatch.setattr(machine, "tool", tool)
    assert find_compiler("aarch64").name == asked[0][0]
    assert asked == [("aarch64-linux-gnu-g++",) if HERE != "aarch64" else link.NATIVE_COMPILERS]


def test_a_compiler_that_hangs_or_is_gone_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="could not make a thing"):
        Compiler(("/nonexistent/g++",), HERE, "g++").run([], "a thing")

    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("g++", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(ResourceError, match="timed out"):
        Compiler(("g++",), HERE, "g++").run([], "a thing")
