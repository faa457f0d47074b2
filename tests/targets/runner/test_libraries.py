from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from kbitc.errors import ResourceError
from kbitc.targets import machine
from kbitc.targets.runner import build, libraries
from kbitc.targets.runner.deploy import with_runtime
from kbitc.targets.target import parse_target

HERE = machine.architecture()
OTHER = "aarch64" if HERE == "x86_64" else "x86_64"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kbitc"


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds neither an index nor a folder of wheels."""
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    no_network(monkeypatch)
    with pytest.raises(ResourceError) as caught:
        libraries.find_libraries(OTHER)
    text = str(caught.value)
    assert f"TVM runtime for {OTHER} is not here and cannot be downloaded" in text
    assert "apache-tvm==" in text
    assert str(own_cache) in text
    assert "\n" not in text
    assert list((own_cache / "runtimes").iterdir()) == []


def test_libraries_put_there_by_hand_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    folder = libraries.foreign_folder(OTHER)
    folder.mkdir(parents=True)
    for name in libraries.MEMBERS:
        (folder / name).write_bytes(b"x")
    assert libraries.find_libraries(OTHER) == {name: folder / name for name in (libraries.RUNTIME, libraries.FFI)}


def test_a_wheel_without_the_libraries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "a.whl", "w") as archive:
        archive.writestr("tvm/lib/libtvm_runtime.so", b"x")
    with pytest.raises(OSError, match=r"lack libtvm_runtime_cuda.so, libtvm_ffi.so"):
        libraries._unpack(tmp_path / "wheels", tmp_path / "out")


def test_this_machine_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    found = libraries.find_libraries(HERE, (libraries.RUNTIME, libraries.RUNTIME_CUDA, libraries.FFI))
    assert all(path.is_file() for path in found.values())


def test_the_cache_key_follows_sources_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = libraries.find_libraries(HERE)
    compiler = build.Compiler(("g++",), HERE, "g++")
    first = build._key(compiler, found)
    assert build._key(compiler, found) == first
    assert build._key(build.Compiler(("clang++",), HERE, "clang++"), found) != first
    (tmp_path / "main.cc").write_text("int main() { return 1; }")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build._key(compiler, found) != first


def test_a_failed_build_leaves_no_runner_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / "main.cc").write_text("this is no program")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(Exception, match="could not make kbitc-run"):
        build.runner_folder(HERE)
    assert list((own_cache / "runner").iterdir()) == []


def test_cuda_bundles_carry_the_cuda_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libcudart.so.13").write_bytes(b"x")
    monkeypatch.setattr("kbitc.targets.runner.deploy.runner_folder", lambda architecture: tmp_path)
    monkeypatch.setattr("kbitc.targets.runner.deploy.find_cudart", lambda: tmp_path / "libcudart.so.13")
    files = with_runtime(parse_target("reference"))
    assert set(files) == {"kbitc-run", "lib/libtvm_runtime.so", "lib/libtvm_ffi.so"}
    if HERE == "x86_64":
        files = with_runtime(parse_target("cuda:sm_90"))
        assert files["lib/libcudart.so.13"] == tmp_path / "libcudart.so.13"
        assert "lib/libtvm_runtime_cuda.so" in files
