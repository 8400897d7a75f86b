"""Measuring a file on one device, and on several in turns."""

from __future__ import annotations

import json

import pytest

from autocompress.cli import main
from autocompress.commands import measure as module
from autocompress.commands.measure import measure_model, measure_on
from autocompress.devices.runtime import TITLES, Runtime
from autocompress.errors import UsageError
from autocompress.records import Measurement


@pytest.fixture
def asked(monkeypatch):
    """Devices that answer with the latencies under their names, one after the other; in which order they were asked."""
    asked, latencies = [], {"steady": [2.0, 2.0, 2.0], "restless": [9.0, 1.0, 3.0]}

    class Answering:
        def __init__(self, name):
            self.name, self.answers = name, iter(latencies[name])

        def measure(self, paths, *, seconds_each):
            asked.append(self.name)
            seconds = next(self.answers)
            return [Measurement(median=seconds, low=seconds, high=seconds, p95=seconds, n=9) for _ in paths]

    monkeypatch.setattr(module, "open_device", Answering)
    return asked


def test_several_devices_take_turns_and_each_is_told_by_its_middle_one(asked, tiny):
    found = measure_on(tiny, ["steady", "restless"])
    assert asked == ["steady", "restless"] * 3
    assert [latency.median for latency in found] == [2.0, 3.0]
    assert [(latency.low, latency.high, latency.noisy) for latency in found] == [(2.0, 2.0, False), (1.0, 9.0, True)]
    assert "turns differ by 800 %" in found[1].noise_reason


def test_one_device_is_asked_once(asked, tiny):
    assert measure_model(tiny, device="restless").median == 9.0
    assert asked == ["restless"]


def test_a_model_that_cannot_be_exported_is_told_as_such(monkeypatch):
    def fail(*_, **__):
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr(module, "write_bundle", fail)
    with pytest.raises(
        UsageError, match=r"autocompress.testing.models:tiny_resnet cannot be measured: ValueError: .* maximum protobuf size"
    ):
        measure_model("autocompress.testing.models:tiny_resnet", device="onnxruntime:cpu", input="3x16x16")


@pytest.mark.skipif(not Runtime("openvino").is_here, reason="openvino is not installed")
def test_runtimes_are_compared_side_by_side(tiny, monkeypatch, capsys):
    monkeypatch.setattr(module, "MEASURE_S", 0.05)
    names = [f"{runtime}:cpu?threads=1" for runtime in TITLES]
    options = [part for name in names for part in ("--device", name)]
    assert main(["measure", str(tiny), *options]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == names
    assert all("95 % interval" in line for line in lines)
    assert main(["measure", str(tiny), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["device"] for entry in told["devices"]] == names
    assert all(entry["latency_s"]["median"] > 0 for entry in told["devices"])
