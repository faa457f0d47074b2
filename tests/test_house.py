"""The house rules that a linter does not know: lengths, import walls, imports without effect."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("kbitc", "passes", "targets")
ALL_FOLDERS = (*SOURCE_FOLDERS, "examples", "tests")
FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES = 400, 600, 60
# These may know numbers only: no graph, no target.
NUMPY_ONLY = ("kbitc/quant/formats", "passes/solvers", "passes/observers")
NUMPY_ONLY_MAY_IMPORT = {"numpy", "kbitc.quant", "kbitc.errors", "kbitc.passes.solvers", "kbitc.passes.observers"}


def python_files(*folders: str) -> list[Path]:
    """Every Python file below these folders of the project, not through links."""
    return sorted(
        file
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in file.parents if parent.is_relative_to(ROOT))
    )


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def imported(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, at any depth of its code; relative imports made absolute."""
    package = list(file.relative_to(ROOT).parent.parts)
    package = package if package[0] == "kbitc" else ["kbitc", *package]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *((node.module or "").split("."))]).strip(".")


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_files_stay_short() -> None:
    too_long = []
    for file in python_files(*ALL_FOLDERS):
        kernel = file.is_relative_to(ROOT / "targets") and bool({"rules", "kernels"} & set(file.parts))
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > (KERNEL_FILE_LINES if kernel else FILE_LINES):
            too_long.append(f"{file.relative_to(ROOT)}: {lines} lines")
    assert not too_long


def test_functions_stay_short() -> None:
    """Lines of code from `def` to the end; the docstring, which has to state shapes and units, is not counted."""
    too_long = []
    for file in python_files(*SOURCE_FOLDERS, "examples"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                first = node.body[0]
                has_text = ast.get_docstring(node, clean=False) is not None
                text = (first.end_lineno or first.lineno) - first.lineno + 1 if has_text else 0
                lines = node.end_lineno - node.lineno + 1 - text
                if lines > FUNCTION_LINES:
                    too_long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long


def test_only_targets_import_tvm() -> None:
    """And benchmarks, which time single kernels without a model around them."""
    guilty = [
        str(file.relative_to(ROOT))
        for file in python_files("kbitc", "passes", "examples")
        if "benchmarks" not in file.parts and any(is_within(name, {"tvm"}) for name in imported(file))
    ]
    assert not guilty


def test_passes_do_not_import_the_compiler_side_of_targets() -> None:
    """A pass may ask a Target what it accepts; lowering, rules and kernels come after it."""
    guilty = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files("passes")
        for name in imported(file)
        if is_within(name, {"kbitc.targets"}) and not is_within(name, {"kbitc.targets.target"})
    ]
    assert not guilty


def test_formats_solvers_and_observers_know_numpy_only() -> None:
    allowed = NUMPY_ONLY_MAY_IMPORT | set(sys.stdlib_module_names)
    guilty = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files(*(folder for folder in NUMPY_ONLY if (ROOT / folder).is_dir()))
        for name in imported(file)
        if not is_within(name, allowed)
    ]
    assert not guilty


def test_packages_are_imported_by_their_installed_names() -> None:
    guilty = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files(*ALL_FOLDERS)
        for name in imported(file)
        if is_within(name, {"passes", "targets"})
    ]
    assert not guilty


def test_nothing_is_left_for_later() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error")
    guilty = [
        f"{file.relative_to(ROOT)}:{number} {word}"
        for file in python_files(*ALL_FOLDERS)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for word in words
        if word in line
    ]
    assert not guilty


IMPORT_ALL = """
import contextlib, importlib, io, json, os, sys
before = dict(os.environ)
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for name in sys.argv[1:]:
        importlib.import_module(name)
loaded = sorted(set(sys.modules) & {"tvm", "torch", "onnxruntime"})
print(json.dumps([printed.getvalue(), dict(os.environ) == before, loaded]))
"""


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "kbitc" else ["kbitc", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_in_a_new_process(names: list[str]) -> list[object]:
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result: list[object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("folder", ["kbitc", "passes"])
def test_importing_everything_has_no_effect_and_loads_no_tvm(folder: str) -> None:
    names = [module_name(file) for file in python_files(folder) if file.name != "__main__.py"]
    printed, same_environment, loaded = import_in_a_new_process(names)
    assert (printed, same_environment) == ("", True)
    assert isinstance(loaded, list) and not {"tvm", "torch"} & set(loaded)


def test_importing_targets_prints_nothing_and_changes_no_environment() -> None:
    names = [module_name(file) for file in python_files("targets")]
    printed, same_environment, _ = import_in_a_new_process(names)
    assert (printed, same_environment) == ("", True)


def test_naming_a_target_needs_no_tvm() -> None:
    assert import_in_a_new_process(["kbitc.targets.target"])[2] == []


def test_help_loads_nothing_heavy() -> None:
    """`kbitc --help` has to answer in 0.3 s; what makes it slow is a heavy import, so those are looked for."""
    code = (
        "import sys\nfrom kbitc.cli import main\nsys.argv = ['kbitc', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'tvm', 'torch'} & set(sys.modules)),"
        " file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert "compile" in done.stdout
