"""Finds plug-in files by name: a data type or a solver is one file, imported only when it is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from kbitc.errors import UsageError


def names(package: str) -> list[str]:
    """File names (without .py) in a package folder, sorted; the files are not imported."""
    folder = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def find(package: str, name: str, kind: str) -> ModuleType:
    """The module `name` of a package.

    Raises:
        UsageError: when there is none; names the nearest.
    """
    known = names(package)
    if name not in known:
        raise UsageError(f"unknown {kind}", got=repr(name), remedy=nearest(name, known))
    return importlib.import_module(f"{package}.{name}")


def nearest(name: str, known: list[str]) -> str:
    """A remedy sentence that names the closest known names."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known[:20])
