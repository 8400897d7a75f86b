"""What all tests share: a cache folder of their own, and the real data sets where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Latency tables and decoded images of a test run do not mix with the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_sets() -> Path:
    """The folder of real data sets; skips where it is absent."""
    folder = Path(os.environ.get("AUTOCOMPRESS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no data sets in {folder} (set AUTOCOMPRESS_DATA)")
    return folder
