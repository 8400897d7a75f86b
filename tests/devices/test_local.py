"""Measuring in a child process: what it reports, and what a crash, a hang and a hostile file become."""

import json
import os
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
import torch
from laws.networks import network
from onnx import TensorProto, helper

from autocompress.compress.quantize import calibrate, fake_quantize, snap_biases
from autocompress.compress.student import build_student
from autocompress.devices import child as program
from autocompress.devices import local as module
from autocompress.devices import open_device, processes, running
from autocompress.devices.local import LocalCpu
from autocompress.devices.runtime import TITLES, Runtime
from autocompress.errors import DeviceUnavailable, PolicyFailure, UsageError
from autocompress.export import onnx_bytes
from autocompress.graph import Graph
from autocompress.policy import Policy, QuantSpec
from autocompress.system import machine
from autocompress.task import same_device
from devices.files import difference_model, linear_model

SHORT = 0.05


@pytest.fixture
def device():
    return LocalCpu(Runtime("onnxruntime"))


@pytest.fixture(params=TITLES)
def each(request):
    """A device of each runtime."""
    if not Runtime(request.param).is_here:
        pytest.skip(f"{request.param} is not installed")
    return LocalCpu(Runtime(request.param))


def test_measurement_of_a_tiny_file(each, tiny):
    (result,) = each.measure([tiny], seconds_each=SHORT)
    assert 0 < result.low <= result.median <= result.high < 0.1
    assert result.median <= result.p95
    assert result.n >= 50
    assert result.environment["threads"] == "1"
    assert result.environment[each.profile.runtime]
    assert result.environment["processor"]


def test_files_are_measured_together_and_in_order(device, tmp_path):
    paths = []
    for n in (8, 1024):
        paths.append(tmp_path / f"{n}.onnx")
        onnx.save(linear_model(n), paths[-1])
    small, large = device.measure(paths, seconds_each=SHORT)
    assert small.n > 0 and large.n > 0
    assert small.median < large.median


def test_many_small_models(each):
    models = [linear_model(8).SerializeToString(), b"not a model", linear_model(1024).SerializeToString()]
    small, broken, large = each.measure_many(models, seconds_each=0.01)
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


@pytest.mark.parametrize("content", [b"", b"not an onnx file", linear_model().SerializeToString()[:-40]])
def test_a_file_that_does_not_load_is_a_policy_failure_that_names_it(each, tiny, tmp_path, content):
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(PolicyFailure, match=r"broken\.onnx"):
        each.measure([tiny, tmp_path / "broken.onnx"], seconds_each=SHORT)


def test_a_file_that_fails_at_run_time_is_a_policy_failure_that_names_it(device, tiny, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(failing_at_run_time())
    with pytest.raises(PolicyFailure, match=r"broken\.onnx"):
        device.measure([tiny, tmp_path / "broken.onnx"], seconds_each=SHORT)


@pytest.fixture
def child(monkeypatch):
    """Replace the child's program."""
    return lambda program: monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", program))


@pytest.mark.parametrize("at_once_s", [0.0, 10.0], ids=["one by one", "many at once"])
def test_outputs_are_those_of_the_runtime_in_the_order_of_the_inputs(each, tmp_path, monkeypatch, at_once_s):
    monkeypatch.setattr(running, "AT_ONCE_S", at_once_s)
    onnx.save(linear_model(4, inputs=[2, 4]), tmp_path / "two.onnx")
    batches = [np.random.default_rng(seed).standard_normal((2, 4), dtype=np.float32) for seed in range(9)]
    np.testing.assert_array_equal(each.run(tmp_path / "two.onnx", zip(batches)), np.concatenate(batches))


def test_each_input_of_a_file_gets_its_array(each, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "AT_ONCE_S", 0.0)
    onnx.save(difference_model(), tmp_path / "two.onnx")
    batches = [(np.full((2, 3), number, np.float32), np.full((2, 1), 10 * number, np.int64)) for number in range(9)]
    np.testing.assert_array_equal(each.run(tmp_path / "two.onnx", iter(batches)), np.concatenate([a - b for a, b in batches]))
    assert each.measure([tmp_path / "two.onnx"], seconds_each=SHORT)[0].median > 0


@pytest.mark.parametrize("arrays", [1, 3])
def test_a_file_that_is_given_another_number_of_arrays_fails_at_once(device, tmp_path, arrays):
    onnx.save(difference_model(), tmp_path / "two.onnx")
    with pytest.raises(PolicyFailure, match=f"the file has 2 inputs, but is given {arrays}"):
        device.run(tmp_path / "two.onnx", [(np.zeros((2, 3), np.float32),) * arrays])


def test_free_dimensions_are_one(each, tmp_path):
    onnx.save(linear_model(4, inputs=["n", 4]), tmp_path / "free.onnx")
    assert each.measure([tmp_path / "free.onnx"], seconds_each=SHORT)[0].median > 0


def test_runtimes_agree_on_an_int8_network(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    model, inputs = network("tiny_resnet")
    graph = Graph.trace(model, (inputs[:1],))
    policy = Policy(quant=QuantSpec(bits=8, reduced_range=True))
    student = fake_quantize(build_student(graph, policy), policy.quant)
    calibrate(student, [torch.randn(32, *inputs.shape[1:])])
    (tmp_path / "int8.onnx").write_bytes(onnx_bytes(snap_biases(student), policy.quant, (inputs[:1],)))
    batches = [torch.randn(1, *inputs.shape[1:]).numpy() for _ in range(24)]
    one, other = (LocalCpu(Runtime(name)).run(tmp_path / "int8.onnx", zip(batches)) for name in TITLES)
    assert np.abs(one - other).max() <= 0.05 * np.abs(one).max()
    with torch.no_grad():
        own = student(torch.from_numpy(np.concatenate(batches))).numpy()
    assert np.abs(one - own).max() <= 0.05 * np.abs(own).max()


def test_bf16_is_what_was_asked_for_and_nothing_else(tmp_path):
    exact, rounded = Runtime("openvino"), Runtime("openvino", precision="bf16")
    if not (exact.is_here and rounded.can_compute):
        pytest.skip("no OpenVINO, or no instructions for bf16")
    onnx.save(linear_model(256), tmp_path / "linear.onnx")
    batches = [np.random.default_rng(seed).standard_normal((1, 256), dtype=np.float32) for seed in range(8)]
    one, again, other = (LocalCpu(runtime).run(tmp_path / "linear.onnx", zip(batches)) for runtime in (exact, exact, rounded))
    np.testing.assert_array_equal(one, again)
    assert 1e-4 < np.abs(one - other).max() / np.abs(one).max() < 0.03
    device = LocalCpu(rounded)
    assert (device.profile.is_exact, device.environment()["precision"]) == (False, "bf16")
    assert open_device(device.name).name == device.name == "openvino:cpu?threads=1&precision=bf16"
    assert not same_device(device.name, "openvino:cpu")


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(Runtime, "is_here", False)
    with pytest.raises(UsageError, match="OpenVINO is not installed") as error:
        LocalCpu(Runtime("openvino"))
    assert error.value.hint == 'pip install "autocompress[openvino]"'


def test_several_processes_share_the_batches_and_keep_their_order(device, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "ALONE_S", 0.0)
    monkeypatch.setattr(running, "AT_ONCE_S", 0.0)
    monkeypatch.setattr(running, "_helpers", lambda pid, threads: 2)
    onnx.save(linear_model(4, inputs=[2, 4]), tmp_path / "two.onnx")
    batches = [np.random.default_rng(seed).standard_normal((2, 4), dtype=np.float32) for seed in range(200)]
    seen = []

    def slowly():
        for batch in batches:
            seen.append({p.pid for p in psutil.Process().children()})
            time.sleep(0.01)
            yield (batch,)

    np.testing.assert_array_equal(device.run(tmp_path / "two.onnx", slowly()), np.concatenate(batches))
    assert max(map(len, seen)) == 3


@pytest.mark.parametrize("fails_at", [0, 1, 40])
def test_what_the_inputs_raise_ends_all_processes(device, tiny, monkeypatch, fails_at):
    monkeypatch.setattr(running, "ALONE_S", 0.0)
    monkeypatch.setattr(running, "AT_ONCE_S", 0.0)

    def batches():
        for number in range(1000):
            if number == fails_at:
                raise ValueError("no more")
            time.sleep(0.01)
            yield (np.zeros((1, 16), np.float32),)

    with pytest.raises(ValueError, match="no more"):
        device.run(tiny, batches())
    assert not [p for p in psutil.Process().children() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_processes_are_as_many_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    size = psutil.Process().memory_info().rss
    for available, expected in ((100, [5, 2, 0, 0]), (4.5, [2, 2, 0, 0]), (0.1, [0, 0, 0, 0])):
        monkeypatch.setattr(machine, "free_bytes", lambda available=available: int(available * size))
        assert [running._helpers(os.getpid(), threads) for threads in (1, 2, 4, 8)] == expected
    assert running._helpers(2**22 + 1, 1) == 0, "it has ended"


FIRST_ONLY = """
import os, sys, signal
sys.argv = ["child"]
from pathlib import Path
mark = Path({mark!r})
if mark.exists():
    sys.stdin.buffer.readline()
    os.kill(os.getpid(), signal.SIGKILL)
mark.touch()
from autocompress.devices.child import main
main()
"""


def test_what_a_helper_fails_over_is_done_by_the_first_process(device, tmp_path, monkeypatch, child):
    monkeypatch.setattr(running, "ALONE_S", 0.0)
    monkeypatch.setattr(running, "AT_ONCE_S", 0.0)
    monkeypatch.setattr(running, "_helpers", lambda pid, threads: 2)
    child(FIRST_ONLY.format(mark=str(tmp_path / "started")))
    onnx.save(linear_model(4, inputs=[2, 4]), tmp_path / "two.onnx")
    batches = [np.random.default_rng(seed).standard_normal((2, 4), dtype=np.float32) for seed in range(60)]

    def slowly():
        for batch in batches:
            time.sleep(0.02)
            yield (batch,)

    np.testing.assert_array_equal(device.run(tmp_path / "two.onnx", slowly()), np.concatenate(batches))


LOUD = """
import autocompress.devices.child as program
from autocompress.devices.child import open_session
def loud(*given):
    print("loading kernels", flush=True)
    return open_session(*given)
program.open_session = loud
program.main()
"""


def test_what_a_runtime_prints_is_no_answer(device, tiny, child):
    child(LOUD)
    assert device.run(tiny, [(np.zeros((1, 16), np.float32),)]).shape == (1, 16)
    assert device.measure([tiny], seconds_each=SHORT)[0].median > 0
    assert device.measure_many([tiny.read_bytes()], seconds_each=0.01)[0] > 0


def test_a_process_that_answers_with_anything_else_is_ended(device, tiny, child, monkeypatch):
    monkeypatch.setattr(running, "ENDING_S", 0.2)
    child("import sys; print('5' if sys.stdin.buffer.readline() else '', flush=True); sys.stdin.buffer.read()")
    with pytest.raises(PolicyFailure, match="must answer with an array"):
        device.run(tiny, [(np.zeros((1, 16), np.float32),)])


def test_a_runtime_of_a_vendor_is_called_by_its_own_name(monkeypatch):
    def version(name):
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError
        return "1.2"

    monkeypatch.setattr(metadata, "version", version)
    for brought, told in ({"onnxruntime": ["onnxruntime-gpu"]}, "onnxruntime-gpu 1.2"), ({}, "of unknown version"):
        monkeypatch.setattr(metadata, "packages_distributions", lambda brought=brought: brought)
        assert Runtime("onnxruntime").environment()["onnxruntime"] == told


def test_an_interruption_does_not_wait_for_helpers(device, tmp_path, monkeypatch, child):
    """One that hangs is ended at once."""
    monkeypatch.setattr(running, "ALONE_S", 0.0)
    monkeypatch.setattr(running, "_helpers", lambda pid, threads: 1)
    child(FIRST_ONLY.format(mark=str(tmp_path / "started")).replace("os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(60)"))
    onnx.save(linear_model(4, inputs=[2, 4]), tmp_path / "two.onnx")
    begun = time.monotonic()

    def batches():
        while time.monotonic() < begun + 3.0:
            time.sleep(0.02)
            yield (np.zeros((2, 4), np.float32),)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.run(tmp_path / "two.onnx", batches())
    assert time.monotonic() - begun < 20.0


@pytest.mark.parametrize("rows", [1, 100_000], ids=["small", "more than a pipe holds"])
@pytest.mark.parametrize("content", [b"", b"not an onnx file", failing_at_run_time()])
def test_a_file_that_cannot_be_run_is_a_policy_failure_that_names_it(device, tmp_path, content, rows):
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(PolicyFailure, match=r"cannot run broken\.onnx"):
        device.run(tmp_path / "broken.onnx", [(np.zeros((rows, 3), np.float32),)])


CRASH = "import os, signal, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_crash_while_it_runs_a_file_is_a_policy_failure(device, tiny, child, name):
    child(CRASH.format(name))
    with pytest.raises(PolicyFailure, match=name):
        device.run(tiny, [(np.zeros((1, 16), np.float32),)])


def test_a_hang_while_it_runs_a_file_is_a_policy_failure(device, tiny, child, monkeypatch):
    child("import time; time.sleep(60)")
    monkeypatch.setattr(processes, "TIMEOUT_S", 0.5)
    with pytest.raises(PolicyFailure, match="must answer within"):
        device.run(tiny, [(np.zeros((1, 16), np.float32),)])


def test_a_caller_that_stops_leaves_no_process(device, tiny):
    def batches():
        yield (np.zeros((1, 16), np.float32),)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.run(tiny, batches())
    assert not [p for p in psutil.Process().children() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGILL"])
def test_a_crash_is_a_policy_failure_with_the_signals_name(device, tiny, child, name):
    child(CRASH.format(name))
    with pytest.raises(PolicyFailure, match=name):
        device.measure([tiny])


def test_a_hang_is_a_policy_failure_and_frees_the_device(device, tiny, child, monkeypatch):
    child("import time; time.sleep(60)")
    monkeypatch.setattr(module, "MOST_A_FILE_S", 0.0)
    monkeypatch.setattr(processes, "TIMEOUT_S", -0.5)
    with pytest.raises(PolicyFailure, match="timeout"):
        device.measure([tiny], seconds_each=1.0)
    monkeypatch.undo()
    assert device.measure([tiny], seconds_each=SHORT)


def test_a_runtime_that_does_not_start_is_an_unavailable_device(device, tiny, child):
    child("raise ImportError('libonnxruntime is gone')")
    with pytest.raises(DeviceUnavailable, match="libonnxruntime is gone"):
        device.measure([tiny])


# -- how often a file is called -----------------------------------------------------------------------------------------


def test_the_patience_of_the_parent_follows_from_what_the_process_may_take(device, tiny, monkeypatch):
    asked = []

    def answer(*_, **options):
        asked.append((json.loads(options["input"])["most_s"], options["timeout"]))
        return SimpleNamespace(returncode=0, stdout=json.dumps({"error": "x", "index": 0, "medians": []}), stderr="")

    monkeypatch.setattr(processes.subprocess, "run", answer)
    with pytest.raises(PolicyFailure):
        device.measure([tiny, tiny], seconds_each=2.0)
    device.measure_many([])
    for most_s, timeout in asked:
        assert timeout >= most_s + 60.0, "one very slow call"
    assert asked[0][0] >= 2 * (2.0 + program.WARM_UP_CAP_S + program.ROUNDS_CAP_S)


def test_files_of_the_current_folder_are_not_taken_for_pythons_own(device, tiny, tmp_path, monkeypatch):
    for name in ("random", "signal", "base64"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))
    assert device.measure([tiny], seconds_each=SHORT)


# -- files from elsewhere ---------------------------------------------------------------------------------------------
