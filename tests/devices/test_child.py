"""The process that measures: how often it calls files, what it knows of itself, and when it ends."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from autocompress.devices import child as program
from autocompress.devices.base import measurements
from autocompress.devices.runtime import Runtime

SHORT = 0.05


@pytest.mark.parametrize(("busy", "threads", "noisy"), [(1.0, 1, False), (0.5, 1, True), (0.5, 2, False)])
def test_a_processor_that_others_share_all_the_time_is_noticed(busy, threads, noisy):
    """Its latencies are as even as those of a free one, and twice as long."""
    answer = {"rounds": [[[1e-3] * 5] * 12], "firsts": [1e-3], "busy": busy}
    (found,) = measurements(answer, [Path("a.onnx")], Runtime("onnxruntime", threads), {})
    assert ("other programs took 50 %" in found.noise_reason) is found.noisy is noisy


@pytest.mark.alone
def test_a_measuring_process_knows_whether_it_had_the_processor(tiny):
    request = {"paths": [str(tiny)], "seconds_each": SHORT, "fewest_rounds": 5, "most_s": 60.0} | Runtime("onnxruntime").asked
    assert 0.05 < program.measure(request)["busy"] < 1.5


def test_the_child_imports_neither_torch_nor_onnx():
    program = (
        "import sys, autocompress.devices.child; print([name for name in ('torch', 'onnx', 'openvino', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PARENT = """
import json, os, subprocess, sys, time
command = [sys.executable, "-m", "autocompress.devices.child"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
measure = {"kind": "measure", "paths": [sys.argv[1]], "seconds_each": 30, "fewest_rounds": 5, "most_s": 60}
request = measure | {"runtime": "onnxruntime", "threads": 1, "parent": os.getpid()}
child.stdin.write(json.dumps(request))
child.stdin.close()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("after_s", [0.0, 1.0], ids=["as it starts", "as it measures"])
def test_the_child_dies_with_its_parent(tiny, after_s):
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tiny)], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(after_s)
        assert child.is_running()
        parent.kill()
    gone, _ = psutil.wait_procs([child], timeout=15)
    assert gone or child.status() == psutil.STATUS_ZOMBIE


class Calls:
    """A runtime whose clock only its own calls move; `seconds` of a call by the path of the file."""

    def __init__(self, seconds):
        self.seconds, self.now, self.made = seconds, 0.0, dict.fromkeys(seconds, 0)

    def open(self, runtime, path, threads, precision):
        return SimpleNamespace(run=lambda _: self.call(path), inputs=[])

    def call(self, path):
        self.now += self.seconds[path]
        self.made[path] += 1


@pytest.fixture
def measured(monkeypatch):
    """(answer, calls, seconds) of measuring files whose calls take as long as `seconds` says."""

    def measure(most_s=240.0, seconds_each=1.0, **seconds):
        calls = Calls(seconds)
        monkeypatch.setattr(program, "open_session", calls.open)
        monkeypatch.setattr(program, "time", SimpleNamespace(perf_counter=lambda: calls.now, process_time=lambda: calls.now))
        request = {"paths": list(seconds), "seconds_each": seconds_each, "fewest_rounds": 5, "most_s": most_s} | Runtime(
            "onnxruntime"
        ).asked
        return program.measure(request), calls.made, calls.now

    return measure


def test_a_fast_file_is_called_five_times_a_round_and_once_before(measured):
    answer, made, _ = measured(fast=0.001)
    (rounds,) = answer["rounds"]
    assert {len(samples) for samples in rounds} == {5}
    assert len(rounds) == pytest.approx(1.0 / 0.006, abs=1)
    assert made["fast"] == 11 + 6 * len(rounds), "the first call, and twice five until they are stable"


@pytest.mark.parametrize(("seconds", "rounds", "warm_up"), [(0.03, 34, 11), (0.5, 12, 5), (2.0, 10, 2), (10.0, 5, 2), (20.0, 5, 2)])
def test_a_slow_file_is_called_once_a_round(measured, seconds, rounds, warm_up):
    answer, made, took = measured(slow=seconds)
    assert [len(samples) for samples in answer["rounds"][0]] == [1] * rounds
    assert made["slow"] == warm_up + rounds
    assert took <= max(20.0 + program.WARM_UP_CAP_S, 7 * seconds) + seconds


def test_a_slow_and_a_fast_file_each_get_their_own_rounds(measured):
    answer, _, _ = measured(slow=0.5, fast=0.001)
    assert [len(rounds) for rounds in answer["rounds"]] == [12, 12]
    assert [len(rounds[0]) for rounds in answer["rounds"]] == [1, 5]


def test_what_there_is_at_the_hard_end_is_returned_and_no_more_than_one_call_later(measured):
    answer, _, took = measured(slow=50.0, most_s=240.0)
    assert len(answer["rounds"][0]) == 3
    assert took <= 240.0 + 50.0
    answer, _, took = measured(slow=200.0, most_s=240.0)
    assert answer["index"] == 0
    assert "no round fits into 240 s" in answer["error"]
    assert took <= 240.0 + 200.0


@pytest.mark.parametrize("error", [ValueError(), ValueError("\n"), ValueError("two\nlines")])
def test_an_error_of_the_runtime_without_a_message_is_told_too(monkeypatch, error):
    def fail(runtime, path, threads, precision):
        raise error

    monkeypatch.setattr(program, "open_session", fail)
    request = {"paths": ["x"], "seconds_each": 1.0, "fewest_rounds": 5, "most_s": 60.0}
    answer = program.measure(request | Runtime("onnxruntime").asked)
    assert answer == {"error": "ValueError: two" if "two" in str(error) else "ValueError", "index": 0}
