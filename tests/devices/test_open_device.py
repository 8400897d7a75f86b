"""Devices by name."""

import json
import os

import pytest

from autocompress import cli
from autocompress.devices import list_devices, open_device
from autocompress.devices.runtime import TITLES, Runtime
from autocompress.errors import UsageError
from autocompress.system import machine


@pytest.mark.parametrize("runtime", [name for name in TITLES if Runtime(name).is_here])
@pytest.mark.parametrize(("options", "threads"), [("", 1), ("?threads=1", 1), ("?threads=2", 2), ("?threads=3", 3)])
def test_a_device_opens_with_its_threads(monkeypatch, runtime, options, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    device = open_device(f"{runtime}:cpu{options}")
    assert device.profile.threads == threads
    assert device.environment()["threads"] == str(threads)
    assert open_device(device.name).name == device.name


@pytest.mark.parametrize("threads", ["0", "-1", str(machine.usable() + 1), "two", "1.5", "", "²"])
def test_threads_out_of_range_are_refused(threads):
    with pytest.raises(UsageError, match=r"threads|device reference|option"):
        open_device(f"onnxruntime:cpu?threads={threads}")


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("onnxruntime:cpu?precision=bf16", "openvino takes"),
        ("openvino:cpu?precision=int8", "no runtime here"),
        ("agent://127.0.0.1:1?precision=bf16", "openvino takes"),
    ],
)
def test_a_precision_that_the_runtime_does_not_compute_in_is_refused(name, cure):
    with pytest.raises(UsageError, match="precision must be f32") as error:
        open_device(name)
    assert cure in error.value.hint


@pytest.mark.skipif(not Runtime("openvino").is_here, reason="openvino is not installed")
def test_a_precision_that_the_processor_cannot_compute_in_is_not_silently_another(monkeypatch):
    monkeypatch.setattr(Runtime, "can_compute", property(lambda runtime: runtime.is_exact))
    with pytest.raises(UsageError, match="no instructions for bf16"):
        open_device("openvino:cpu?precision=bf16")
    assert open_device("openvino:cpu?precision=f32").name == "openvino:cpu?threads=1"


@pytest.mark.parametrize("name", ["onnxruntime:gpu", "openvino:npu", "cpu", "onnxruntime:cpu?cores=1"])
def test_unknown_devices_and_options_are_refused_with_a_cure(name):
    with pytest.raises(UsageError) as error:
        open_device(name)
    assert error.value.hint


def test_what_is_listed_opens():
    assert [entry["name"].partition(":")[0] for entry in list_devices()] == list(TITLES)
    for entry in list_devices():
        if not entry["available"]:
            assert entry["note"].startswith("pip install")
            continue
        assert open_device(entry["name"]).name == entry["name"]


def test_a_device_that_is_named_is_asked_what_it_is(capsys, monkeypatch):
    assert cli.main(["devices", "onnxruntime:cpu?threads=1", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["devices"]
    assert (told["name"], told["threads"]) == ("onnxruntime:cpu?threads=1", "1")
    assert told["processor"] and told["onnxruntime"]
    monkeypatch.setenv("AUTOCOMPRESS_TOKEN", "a token that nobody is asked for")
    assert cli.main(["devices", "agent://127.0.0.1:9"]) == 4, "nobody is there"
    assert "does not answer" in capsys.readouterr().err
