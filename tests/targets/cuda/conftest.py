from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.targets.cuda.emulator.emulator import Emulator, lacks

CI = os.environ.get("CI", "").lower() in ("1", "true")


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    """The emulated GPU, in a process of its own."""
    reason = lacks()
    if reason is not None:
        if CI:
            pytest.fail(f"CI must have it: {reason}")
        pytest.skip(reason)
    made = Emulator()
    yield made
    made.close()
