"""Searches that are killed, interrupted, terminated and starved, as processes of their own: what was finished is never lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tasks import SLOW_CALLS

from autocompress.cli import main
from autocompress.records import Outcome
from autocompress.session import run_search
from autocompress.task import load_task
from autocompress.testing.devices import FakeDevice

SCRIPT = Path(__file__).parent / "searching.py"
PATIENCE_S = 120.0


def _interruptible() -> None:
    """As in a terminal: a shell's job in the background ignores Ctrl-C, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Running:
    """A search process; its lines are read as they come."""

    run: Path
    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, run: Path, *options: str, **environment: str) -> Running:
        surroundings = os.environ | {"TMPDIR": str(run.parent / "tmp"), "PYTHONWARNINGS": "ignore"} | environment
        (run.parent / "tmp").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(run), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, start_new_session=True,
            preexec_fn=_interruptible,
        )  # fmt: skip
        running = cls(run, process)
        threading.Thread(target=running._read, daemon=True).start()
        return running

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, outcomes: int) -> None:
        """Until so many outcomes are recorded."""
        end = time.monotonic() + PATIENCE_S
        while len(self.lines) < outcomes and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.01)
        assert len(self.lines) >= outcomes, self.process.stderr.read()

    def signalled(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr; nothing of the search is left running."""
        code = self.process.wait(PATIENCE_S)
        words = self.process.stderr.read()
        for stream in (self.process.stdout, self.process.stderr):
            with contextlib.suppress(ValueError):
                stream.close()
        assert not [p for p in psutil.process_iter(["pid"]) if session_of(p.pid) == self.process.pid], "an orphan"
        return code, words


def session_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def journal(run: Path) -> dict[str, Outcome]:
    """The outcomes in the database, read without autocompress."""
    with contextlib.closing(sqlite3.connect(run / "study.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = connection.execute("SELECT key, value_json FROM study_user_attributes WHERE key LIKE 'outcome:%'").fetchall()
    found = [Outcome.model_validate_json(value) for _, value in rows]
    return {outcome.id: outcome for outcome in found}


def states(run: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(run / "study.db")) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM trials ORDER BY number")]


def require_kept(before: dict[str, Outcome], after: dict[str, Outcome]) -> None:
    """Everything is there as it was; only the final measurement and the test score may be added."""
    for id, outcome in before.items():
        added = {name: getattr(outcome, name) for name in ("latency_s", "search_latency_s", "test_score")}
        assert after[id].model_copy(update=added) == outcome


def require_clean(run: Path) -> None:
    """No temporary file, in the run folder or elsewhere; no trial that claims to run."""
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    assert not [path for path in (run.parent / "tmp").iterdir() if "autocompress" in path.name or path.suffix == ".onnx"]
    assert "RUNNING" not in states(run)


def require_readable(run: Path, capsys) -> dict:
    assert main(["show", str(run), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    for entry in content["points"]:
        assert (run / entry["artifact"]).stat().st_size == entry["size_bytes"]
    return content


def resumed(run: Path, net, data, trials: int) -> None:
    """Go on with a search until so many policies were trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocompress.controller.pace.FULL_FACTOR", 0.1)
        patch.setattr("autocompress.controller.pace.LEAST_FULL_STEPS", 1)
        run_search(load_task(run / "task.toml", {"trials": trials}), run, resume=True, model=net, data=data, device=FakeDevice(SLOW_CALLS))


@pytest.fixture(scope="module")
def starved(tmp_path_factory):
    """A search whose disk is full when it records its second outcome; started beside the first test."""
    running = Running.start(tmp_path_factory.mktemp("starved") / "run", FULL_AFTER="1")
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.ended()


def test_a_search_that_is_killed_three_times_loses_nothing(tmp_path, capsys, net, data, starved):
    run, known, draw = tmp_path / "run", {}, random.Random(0)
    for attempt in range(3):
        running = Running.start(run, "--quiet", *(["--resume"] if attempt else []))
        if attempt == 0:
            running.wait_for(2)
            time.sleep(draw.uniform(0.0, 1.5))
        else:
            time.sleep(draw.uniform(3.0, 6.0))  # while it starts, calibrates, trains or writes
        running.signalled(signal.SIGKILL)
        code, words = running.ended()
        assert code == -signal.SIGKILL, words
        after = journal(run)
        require_kept(known, after)
        known = after
        content = require_readable(run, capsys)
        assert content["best"] is not None
    resumed(run, net, data, trials=1)
    require_kept(known, journal(run))
    require_clean(run)
    policies = {entry["digest"] for entry in require_readable(run, capsys)["points"]}
    assert policies >= {o.policy.digest for o in known.values() if not o.failure}
    assert (run / "report.html").is_file()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Two searches at once, the first ended by Ctrl-C, the second by SIGTERM, each after its first outcome; and a rival of the first."""
    folders = [tmp_path_factory.mktemp(name) / "run" for name in ("interrupted", "terminated")]
    first, second = (Running.start(folder) for folder in folders)
    first.wait_for(1)
    rival = subprocess.run(
        [sys.executable, "-m", "autocompress", "search", "--model", "own:net", "--data", "own:blobs", "--out", str(first.run), "--resume"],
        capture_output=True, text=True,
    )  # fmt: skip
    second.wait_for(1)
    first.signalled(signal.SIGINT)
    second.signalled(signal.SIGTERM)
    started = time.monotonic()
    ends = first.ended(), second.ended()
    return folders, ends, rival, time.monotonic() - started


def test_ctrl_c_ends_with_130_a_folder_that_can_be_used_and_how_to_go_on(stopped, capsys):
    (run, _), ((code, words), _), _, seconds = stopped
    assert code == 130
    assert seconds < 20
    assert "interrupted" in words
    assert f"autocompress search --resume --out {run}" in words
    assert "Traceback" not in words
    require_clean(run)
    assert require_readable(run, capsys)["best"]
    assert (run / "report.html").is_file()


def test_sigterm_ends_with_143_and_a_folder_that_can_be_used(stopped, capsys):
    (_, run), (_, (code, words)), _, seconds = stopped
    assert code == 143
    assert seconds < 20
    assert "terminated by SIGTERM" in words
    assert "--resume" in words
    assert "Traceback" not in words
    require_clean(run)
    assert require_readable(run, capsys)["best"]


def test_a_second_search_in_the_same_folder_is_refused(stopped):
    *_, rival, _ = stopped
    assert rival.returncode == 6
    words = rival.stderr
    assert "is in use by process" in words
    assert "--out" in words


def test_a_full_disk_ends_with_6_and_the_search_goes_on_when_there_is_room(starved, capsys, net, data):
    run = starved.run
    code, words = starved.ended()
    assert code == 6, words
    assert "cannot be written" in words
    assert "hint: free space" in words
    assert "Traceback" not in words
    known = journal(run)
    assert list(known) == ["int8"]
    assert not [path for path in run.rglob(".*") if path.name not in (".lock",)]
    require_readable(run, capsys)
    resumed(run, net, data, trials=1)
    require_kept(known, journal(run))
    assert len(journal(run)) > len(known)
    require_clean(run)
