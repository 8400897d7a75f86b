"""Measuring in a child process: what it reports, and what a crash, a hang and a hostile file become."""

import os
import subprocess
import sys
import time

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from autocompress.devices import onnxruntime as module
from autocompress.devices.onnxruntime import OnnxRuntimeCpu
from autocompress.errors import DeviceUnavailable, PolicyFailure, UsageError
from autocompress.export import check_onnx
from devices.files import linear_model

SHORT = 0.05


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.onnx"
    onnx.save(linear_model(), path)
    return path


@pytest.fixture
def device():
    return OnnxRuntimeCpu(1)


def test_measurement_of_a_tiny_file(device, tiny):
    (result,) = device.measure([tiny], seconds_each=SHORT)
    assert 0 < result.low <= result.median <= result.high < 0.1
    assert result.median <= result.p95
    assert result.n >= 50
    assert result.environment["threads"] == "1"
    assert result.environment["onnxruntime"]
    assert result.environment["processor"]


def test_files_are_measured_together_and_in_order(device, tmp_path):
    paths = []
    for n in (8, 1024):
        paths.append(tmp_path / f"{n}.onnx")
        onnx.save(linear_model(n), paths[-1])
    small, large = device.measure(paths, seconds_each=SHORT)
    assert small.n > 0 and large.n > 0
    assert small.median < large.median


def test_many_small_models(device):
    models = [linear_model(8).SerializeToString(), b"not a model", linear_model(1024).SerializeToString()]
    small, broken, large = device.measure_many(models, seconds_each=0.01)
    assert broken is None
    assert 0 < small < large


def failing_at_run_time():
    """Loads, but its reshape does not fit what comes in."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "fails",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]), helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


@pytest.mark.parametrize("content", [b"", b"not an onnx file", linear_model().SerializeToString()[:-40], failing_at_run_time()])
def test_a_file_that_does_not_run_is_a_policy_failure_that_names_it(device, tiny, tmp_path, content):
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(PolicyFailure, match=r"broken\.onnx"):
        device.measure([tiny, tmp_path / "broken.onnx"], seconds_each=SHORT)


@pytest.fixture
def child(monkeypatch):
    """Replace the child's program."""
    run = subprocess.run

    def replace(program):
        monkeypatch.setattr(module.subprocess, "run", lambda _, **options: run([sys.executable, "-c", program], **options))

    return replace


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGILL"])
def test_a_crash_is_a_policy_failure_with_the_signals_name(device, tiny, child, name):
    child(f"import os, signal, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{name})")
    with pytest.raises(PolicyFailure, match=name):
        device.measure([tiny])


def test_a_hang_is_a_policy_failure_and_frees_the_device(device, tiny, child, monkeypatch):
    child("import time; time.sleep(60)")
    monkeypatch.setattr(module, "TIMEOUT_S", -29.5)
    with pytest.raises(PolicyFailure, match="timeout"):
        device.measure([tiny], seconds_each=1.0)
    monkeypatch.undo()
    assert device.measure([tiny], seconds_each=SHORT)


def test_a_runtime_that_does_not_start_is_an_unavailable_device(device, tiny, child):
    child("raise ImportError('libonnxruntime is gone')")
    with pytest.raises(DeviceUnavailable, match="libonnxruntime is gone"):
        device.measure([tiny])


def test_the_child_imports_neither_torch_nor_onnx():
    program = (
        "import sys, autocompress.devices.child; print([name for name in ('torch', 'onnx', 'optuna', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PARENT = """
import json, os, subprocess, sys, time
command = [sys.executable, "-m", "autocompress.devices.child"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
child.stdin.write(json.dumps({"kind": "measure", "paths": [sys.argv[1]], "seconds_each": 30, "threads": 1, "parent": os.getpid()}))
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


# -- files from elsewhere ---------------------------------------------------------------------------------------------


def with_external_data(folder, location):
    """A model whose weight lies in another file."""
    model = linear_model()
    weight = model.graph.initializer[0]
    external_data_helper.set_external_data(weight, location=location, offset=0, length=len(numpy_helper.to_array(weight).tobytes()))
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("way", ["parent", "absolute", "symlink", "hardlink"])
def test_external_data_that_leaves_the_folder_is_refused(tmp_path, way):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.zeros(256, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    if way in ("symlink", "hardlink"):
        (os.symlink if way == "symlink" else os.link)(secret, folder / "weights.bin")
    location = {"parent": "../secret.bin", "absolute": str(secret)}.get(way, "weights.bin")
    with pytest.raises(UsageError, match="not a valid ONNX model"):
        check_onnx(with_external_data(folder, location))


def test_external_data_beside_the_file_is_read(tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.eye(16, dtype=np.float32).tobytes())
    model = check_onnx(with_external_data(tmp_path, "weights.bin"))
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), np.eye(16))


@pytest.mark.parametrize("length", [0, 1, 20, -200, -1])
def test_truncated_files_are_refused(tmp_path, length):
    payload = linear_model().SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(payload[:length])
    with pytest.raises(UsageError, match=r"cut\.onnx"):
        check_onnx(tmp_path / "cut.onnx")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(UsageError):
            check_onnx(path)


def test_a_good_file_passes(tiny):
    assert check_onnx(tiny).graph.name == "tiny"
