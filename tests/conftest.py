"""What all tests share: a cache folder of their own, and the real data sets where they are."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from devices.files import linear_model

from autocompress.results import Results


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What wants the machine for itself comes first: later each process would wait for the other."""
    alone = {item.path for item in items if item.get_closest_marker("alone") is not None}
    items.sort(key=lambda item: item.path not in alone)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is marked `alone` has the machine for itself, although tests run in two processes."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    """The room is shared, or one's own; who wants it alone keeps the door shut meanwhile, so that nobody slips in before."""
    place = Path(tempfile.gettempdir()) / f"autocompress-tests-{os.getuid()}"
    with place.with_suffix(".door").open("w") as door, place.with_suffix(".room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Latency tables and decoded images of a test run do not mix with the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def _no_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What tests say of processors and memory does not depend on the limits that they run under."""
    monkeypatch.setattr("autocompress.system.machine.CONTROL", tmp_path / "no cgroup")


@pytest.fixture(scope="session", autouse=True)
def _lean() -> None:
    """Tests run in two processes on two cores, where threads would wait for each other."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: nobody needs to look through it time and again


@pytest.fixture(scope="session")
def data_sets() -> Path:
    """The folder of real data sets; skips where it is absent."""
    folder = Path(os.environ.get("AUTOCOMPRESS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no data sets in {folder} (set AUTOCOMPRESS_DATA)")
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file of a linear layer."""
    path = tmp_path / "tiny.onnx"
    onnx.save(linear_model(), path)
    return path


@pytest.fixture
def content() -> dict[str, Any]:
    """A front.json that has one of everything: what reports and tables are made of."""
    return dict(json.loads((Path(__file__).parent / "fixtures" / "front.json").read_text(encoding="utf-8")))


@pytest.fixture
def results(content: dict[str, Any]) -> Results:
    """The same, read."""
    return Results.read(content)


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is one that torch.export refuses."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("autocompress.graph.trace.exported", refuse)
