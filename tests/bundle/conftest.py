from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny


@pytest.fixture(scope="session")
def compiled() -> tiny.Tiny:
    """The tiny model for the baseline of this machine."""
    return tiny.compile_tiny("reference")


@pytest.fixture
def bundle(compiled: tiny.Tiny, tmp_path: Path) -> Path:
    """A bundle with a file in a folder of its own, as --with-runtime makes."""
    return compiled.write(tmp_path / "tiny.kbit", runtime_files={"lib/extra.so": b"not a library", "tool": b"#!"})
