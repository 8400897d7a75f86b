"""What a search does to its folder and to its process, without searching."""

from __future__ import annotations

import pytest

from autocompress import session
from autocompress.task import DEMO_MODEL, TASK_FILE, Task


@pytest.mark.parametrize(
    ("begun", "kept"),
    [(Task(model=DEMO_MODEL), False), (Task(model="own:net", data="own:data"), True), (None, True)],
    ids=["demonstration", "own model", "no search"],
)
def test_only_the_demonstrations_weights_are_forgotten(tmp_path, begun, kept):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"weights")
    if begun is not None:
        (tmp_path / TASK_FILE).write_text(begun.to_toml())
    session._forget_teacher(tmp_path)
    assert weights.is_file() is kept
