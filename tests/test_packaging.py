"""What a user installs: the package list, the links, the wheel, the dependencies."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"kbitc": "kbitc", "passes": "kbitc.passes", "targets": "kbitc.targets"}  # folder on disk -> import name


def modules_on_disk() -> list[Path]:
    """Every Python file that is to be installed, as a path below the installed kbitc; links not followed."""
    return [
        Path(*name.split("."), *file.relative_to(ROOT / top).parts)
        for top, name in FOLDERS.items()
        for file in (ROOT / top).rglob("*.py")
        if not any(parent.is_symlink() for parent in file.parents if parent.is_relative_to(ROOT))
    ]


def packages_on_disk() -> set[str]:
    """Import names of every folder that holds a Python file."""
    return {".".join(module.parent.parts) for module in modules_on_disk()}


def test_the_package_list_is_what_is_on_disk() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_package_has_an_init_file() -> None:
    modules = set(modules_on_disk())
    assert [p for p in packages_on_disk() if Path(*p.split("."), "__init__.py") not in modules] == []


@pytest.mark.parametrize("link", ["passes", "targets"])
def test_links_resolve_the_bare_checkout(link: str) -> None:
    path = ROOT / "kbitc" / link
    assert path.is_symlink() and path.readlink() == Path("..") / link


def test_requirements_pin_tvm_and_keep_the_core_light() -> None:
    core = PROJECT["project"]["dependencies"]
    assert "apache-tvm==0.27.0.post1" in core and "apache-tvm-ffi==0.1.14.post0" in core
    assert not any(requirement.startswith(("torch", "transformers", "cuda", "ziglang")) for requirement in core)


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files without caches, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("project") / "kbitc"
    copy.mkdir()
    names = ["pyproject.toml", "README.md", "LICENSE", "kbitc", "passes", "targets"]
    command = ["tar", "-c", "--exclude=__pycache__", "--exclude=*.egg-info", *names]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=copy, input=archive, check=True)
    return copy


def test_the_wheel_built_from_the_sdist_holds_every_package_once(source_copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    build = "import setuptools.build_meta as b, sys; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

    def run(folder: Path, kind: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", build, kind, str(tmp_path)], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / done.stdout.splitlines()[-1]

    sdist = run(source_copy, "sdist")
    subprocess.run(["tar", "-xzf", str(sdist)], cwd=tmp_path, check=True)
    wheel = run(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel")
    with zipfile.ZipFile(wheel) as archive:
        installed = [name for name in archive.namelist() if name.endswith(".py")]
    assert sorted(installed) == sorted(str(module) for module in modules_on_disk())
