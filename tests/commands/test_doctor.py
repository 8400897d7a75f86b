from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest

from autocompress.cli import main
from autocompress.commands import doctor

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def roomy(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))


def test_this_machine_can_search(tmp_path, roomy):
    found = doctor.examine(tmp_path)
    assert (found["usable"], found["problems"]) == (True, [])
    assert found["versions"]["torch"][0].isdigit()
    assert found["cores"] >= 1
    json.dumps(found)


def test_a_full_disk_is_a_problem_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 10**12, 5 * 10**6))
    found = doctor.examine(tmp_path)
    assert not found["usable"]
    assert "5 MB" in found["problems"][0] and "2 GB" in found["problems"][0]


def test_a_missing_package_comes_with_its_cure(tmp_path, roomy, monkeypatch):
    needed = ["numpy>=2", "surely-not-installed>=1", 'not-asked-for; extra == "more"', "torch<2"]
    monkeypatch.setattr("importlib.metadata.requires", lambda package: needed)
    found = doctor.examine(tmp_path)
    missing, old = found["problems"]
    assert missing == "surely-not-installed is not installed: pip install 'surely-not-installed>=1'"
    assert old.startswith("torch must be <2, but is 2.") and old.endswith("pip install 'torch<2'")
    assert found["versions"]["surely-not-installed"] == "missing"
    assert set(found["versions"]) == {"autocompress", "numpy", "surely-not-installed", "torch"}


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, roomy, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    assert doctor.examine(tmp_path)["problems"] == [f"{tmp_path} cannot be written"]


@pytest.mark.parametrize(
    ("governor", "load", "flags", "words"),
    [
        ("performance", 0.0, {"avx2", "avx512_vnni"}, []),
        (None, 0.0, set(), []),
        ("powersave", 0.0, set(), ["powersave"]),
        ("performance", 99.0, set(), ["99.0"]),
        (None, 0.0, {"avx2"}, ["VNNI"]),
        (None, 0.0, {"avx2", "avx_vnni"}, []),
    ],
)
def test_advice_on_what_disturbs_measurements(tmp_path, roomy, monkeypatch, governor, load, flags, words):
    monkeypatch.setattr(doctor.processor, "governor", lambda: governor)
    monkeypatch.setattr(doctor.processor, "flags", lambda: frozenset(flags))
    monkeypatch.setattr(doctor.processor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    advice = doctor.examine(tmp_path)["advice"]
    assert len(advice) == len(words)
    assert all(word in line for word, line in zip(words, advice, strict=True))


def test_the_command_says_what_was_found_and_returns_four_when_unusable(capsys, roomy, monkeypatch):
    assert main(["doctor"]) == 0
    assert "usable: yes" in capsys.readouterr().out
    monkeypatch.setattr("importlib.metadata.requires", lambda package: ["surely-not-installed"])
    assert main(["doctor", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["ok"] is False
