"""What the command line answers when a search cannot go on: one sentence, a cure, and the exit code that says which kind it is."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from tasks import SLOW_CALLS, BrokenDevice

from autocompress import session
from autocompress.cli import main
from autocompress.errors import DeviceUnavailable
from autocompress.system.failures import FAILURES
from autocompress.testing.devices import FakeDevice

run_search = session.run_search


class Unplugged(FakeDevice):
    """Gone when the search asks for it."""

    def measure(self, paths, *, seconds_each=1.0):
        raise DeviceUnavailable("the board does not answer", hint="plug it in")


@pytest.fixture
def search(net, data, tmp_path, monkeypatch):
    """Runs `autocompress search` on a device; returns its exit code."""
    monkeypatch.setattr("autocompress.schedule.SHORT_RUNS", 100)
    monkeypatch.setattr("autocompress.candidates.ahead.WHOLE_NETWORKS", 2)
    monkeypatch.setattr("autocompress.controller.pace.Pace.overhead", lambda self: 0.2)
    monkeypatch.setattr("autocompress.controller.rungs.Rungs.full_rung", lambda self: None)

    def run(device, *options):
        monkeypatch.setattr(session, "run_search", lambda *given, **named: run_search(*given, model=net, data=data, device=device, **named))
        own = ["search", "--model", "own:net", "--data", "own:blobs", "--search-time", "60s", "--quiet", "--out", str(tmp_path / "run")]
        return main([*own, *options])

    return run


def explained(capsys):
    """(sentence, cure) of the one error that was told."""
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    (error,), (hint,) = (re.findall(rf"^{kind}: (.+)$", told.err, re.MULTILINE) for kind in ("error", "hint"))
    return error, hint


def test_3_a_budget_that_nothing_meets_and_the_folder_stays_free_for_one_that_works(search, capsys):
    assert search(FakeDevice(SLOW_CALLS), "--budget", "1us", "--json") == 3
    told = json.loads(capsys.readouterr().out)["error"]
    assert "no policy of the space meets the budget" in told["message"]
    assert re.search(r"--budget [\d.]+[mu]s", told["hint"]), told["hint"]
    assert told["code"] == 3
    assert told["smallest_latency_s"] > 1e-6
    assert search(FakeDevice(SLOW_CALLS), "--budget", "1s", "--trials", "1") == 0


def test_4_a_device_that_is_gone(search, capsys):
    assert search(Unplugged()) == 4
    assert explained(capsys) == ("the board does not answer", "plug it in")


def test_4_a_device_that_is_lost_in_the_middle_of_a_search_which_goes_on_when_it_is_back(search, capsys, tmp_path):
    def points():
        return [entry["id"] for entry in json.loads((tmp_path / "run" / "front.json").read_text(encoding="utf-8"))["points"]]

    class Flaky(FakeDevice):
        """Gone when a policy of the search is to be measured; the original and what is only timed were before."""

        def measure(self, paths, *, seconds_each=1.0):
            if any(path.parent.name.isdigit() for path in paths):
                raise DeviceUnavailable("the board does not answer", hint="plug it in")
            return super().measure(paths, seconds_each=seconds_each)

    assert search(Flaky(SLOW_CALLS)) == 4
    assert explained(capsys) == ("the board does not answer", "plug it in")
    assert points() == ["int8"], "what is finished is kept"
    assert search(FakeDevice(SLOW_CALLS), "--resume", "--trials", "1") == 0
    assert points() == ["00000", "int8"]


def test_6_a_disk_without_room_for_one_policy(search, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert search(FakeDevice(SLOW_CALLS)) == 6
    error, hint = explained(capsys)
    assert "only 1 kB are free" in error and "--out" in hint
    assert not (tmp_path / "run").exists()


def test_5_policies_that_keep_failing_for_one_reason_until_it_is_mended(search, capsys, tmp_path):
    def content():
        return json.loads((tmp_path / "run" / "front.json").read_text(encoding="utf-8"))

    assert search(BrokenDevice(None)) == 5
    error, hint = explained(capsys)
    assert "3 policies in a row failed to measure: the device is on fire" in error
    assert "--resume" in hint and str(tmp_path / "run" / FAILURES) in hint
    assert "the device is on fire" in (tmp_path / "run" / FAILURES).read_text()
    assert len(content()["failures"]) == 3
    assert [entry["id"] for entry in content()["points"]] == ["int8"], "what is finished is kept"
    assert search(FakeDevice(SLOW_CALLS), "--resume", "--trials", "1") == 0
    assert content()["failures"] == [], "the cause is gone, so that nothing stays ruled out"
    assert any(entry["id"].isdigit() for entry in content()["points"])
