"""What all tests share: a cache folder of their own, and the real data sets where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from autocompress.view import Results


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


@pytest.fixture
def content() -> dict[str, Any]:
    """A front.json that has one of everything: what reports and tables are made of."""
    return dict(json.loads((Path(__file__).parent / "fixtures" / "front.json").read_text(encoding="utf-8")))


@pytest.fixture
def results(content: dict[str, Any]) -> Results:
    """The same, read."""
    return Results.read(content)
