"""The agent on a device: packed into one file, without torch there; what it measures, refuses and survives."""

import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from autocompress import cli
from autocompress.devices import agent as service
from autocompress.devices import blobs as blob_store
from autocompress.devices import open_device, remote
from autocompress.devices import server as http_side
from autocompress.devices.access import token_of
from autocompress.devices.blobs import Blobs, Missing
from autocompress.devices.local import LocalCpu
from autocompress.devices.pack import pack
from autocompress.devices.runtime import Runtime
from autocompress.devices.wire import refers_elsewhere
from autocompress.errors import DeviceUnavailable, PolicyFailure, UsageError
from devices.files import difference_model, linear_model

SHORT = 0.05
TOKEN = "a token that is long enough"
ABSENT = ("torch", "pydantic", "psutil", "optuna", "onnx", "scipy")
"""What a device with an agent need not have."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "agent.pyz"
    pack(path)
    return path


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_TOKEN", TOKEN)


@contextlib.contextmanager
def running(packed, *options, port=0):
    """A packed agent in a process where nothing is installed but numpy and the runtime; gives the process and its port."""
    absent = packed.parent / "absent"
    absent.mkdir(exist_ok=True)
    for name in ABSENT:
        (absent / f"{name}.py").write_text("raise ImportError(__name__)\n")
    command = [sys.executable, str(packed), "--port", str(port), *options]
    environment = os.environ | {"PYTHONPATH": str(absent), "AUTOCOMPRESS_TOKEN": TOKEN}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=packed.parent) as process:
        try:
            told = process.stderr.readline()
            assert "listening on 127.0.0.1:" in told, told + process.stderr.read()
            yield process, int(told.partition("127.0.0.1:")[2].partition(";")[0])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def port(packed):
    with running(packed) as (_, port):
        yield port


@pytest.fixture
def device(port):
    return open_device(f"agent://127.0.0.1:{port}")


def test_a_device_elsewhere_measures_and_runs_as_this_one_does(device, tiny, tmp_path):
    here = LocalCpu(Runtime("onnxruntime"))
    assert device.profile == here.profile
    assert device.environment().keys() == here.environment().keys()
    assert open_device(device.name).name == device.name
    large = tmp_path / "large.onnx"
    onnx.save(linear_model(1024), large)
    fast, slow = device.measure([tiny, large], seconds_each=SHORT)
    assert 0 < fast.low <= fast.median <= fast.high < slow.median and fast.n >= 50
    assert fast.environment["processor"] == here.environment()["processor"]
    batches = list(np.random.default_rng(0).standard_normal((7, 1, 16)).astype(np.float32))
    assert np.array_equal(device.run(tiny, zip(batches)), here.run(tiny, zip(batches)))
    medians = device.measure_many([linear_model().SerializeToString(), b"no model"], seconds_each=0.01)
    assert 0 < medians[0] < 0.1 and medians[1] is None


def test_inputs_travel_in_parts_and_only_once(device, tiny, monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", 3 * 64)
    sent, exchange = [], remote.RemoteCpu._exchange
    monkeypatch.setattr(remote.RemoteCpu, "_exchange", lambda self, *what: sent.append(what[0]) or exchange(self, *what))
    batches = list(np.random.default_rng(1).standard_normal((7, 1, 16)).astype(np.float32))
    first = device.run(tiny, zip(batches))
    assert sent.count("POST") == 1 and sent.count("PUT") >= 3, "the model may be there already"
    sent.clear()
    assert np.array_equal(device.run(tiny, zip(batches)), first)
    assert (sent.count("PUT"), sent.count("POST")) == (0, 1)
    monkeypatch.setattr(remote, "GROUP_BYTES", 1)
    assert np.array_equal(device.run(tiny, zip(batches)), first)
    assert sent.count("POST") == 1 + 3


def test_each_input_of_a_file_gets_its_array_there(device, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", 3 * 40)
    onnx.save(difference_model(), tmp_path / "two.onnx")
    batches = [(np.full((2, 3), number, np.float32), np.full((2, 1), 10 * number, np.int64)) for number in range(7)]
    assert np.array_equal(device.run(tmp_path / "two.onnx", iter(batches)), np.concatenate([a - b for a, b in batches]))


def test_the_command_line_measures_there(port, tiny, capsys):
    assert cli.main(["measure", str(tiny), "--device", f"agent://127.0.0.1:{port}", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["latency_s"]["median"] < 0.1


@pytest.mark.parametrize("name", ["agent://", "agent://here:0", "agent://here:x", "agent://here?threads=0", "agent://here?runtime=trt",
                                  "agent://here?cores=1"])  # fmt: skip
def test_wrong_names_are_refused_with_a_cure(name):
    with pytest.raises(UsageError) as error:
        open_device(name)
    assert error.value.hint


@pytest.mark.parametrize(("given", "says"), [("another token, long enough", "refuses the token"), ("short", "16 or more")])
def test_a_wrong_token_is_refused(port, monkeypatch, given, says):
    monkeypatch.setenv("AUTOCOMPRESS_TOKEN", given)
    with pytest.raises(UsageError, match=says):
        open_device(f"agent://127.0.0.1:{port}")


def test_a_token_comes_from_a_file_too_and_only_the_agent_makes_one(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOCOMPRESS_TOKEN")
    file = tmp_path / "token"
    with pytest.raises(UsageError, match="demands a token"):
        token_of(None)
    with pytest.raises(UsageError, match="cannot be read"):
        token_of(file)
    made = token_of(file, make=True)
    assert len(made) >= 32 and file.stat().st_mode & 0o777 == 0o600
    assert token_of(file) == token_of(file, make=True) == made


def ask(port, method, path, body=None, headers=None, token=TOKEN):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} | (headers or {}))
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize(("method", "path"), [("GET", "/facts"), ("PUT", f"/blobs/{64 * '0'}"), ("POST", "/measure"), ("POST", "/run")])
def test_without_the_token_nothing_is_done(port, method, path):
    assert ask(port, method, path, b"{}", token="another token, long enough")[0] == 401
    assert ask(port, method, path, b"{}", headers={"Authorization": ""})[0] == 401


def test_a_blob_must_be_what_its_name_says(port):
    content = b"some content"
    digest = hashlib.sha256(content).hexdigest()
    assert ask(port, "PUT", f"/blobs/{digest}", b"other content")[0] == 400
    wanted = json.dumps({"models": [digest], "runtime": "onnxruntime", "seconds_each": 0.1, "fewest_rounds": 6, "most_s": 1.0})
    assert json.loads(ask(port, "POST", "/measure", wanted)[1])["failed"] == "missing"
    for path in ("/blobs/../../etc/passwd", "/blobs/" + 63 * "0", "/other"):
        assert ask(port, "PUT", path, content)[0] == 404
    assert ask(port, "PUT", f"/blobs/{digest}", content)[0] == 201
    assert "weights itself" in json.loads(ask(port, "POST", "/measure", wanted)[1])["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"models": 3}', b'{"models": ["../../etc/passwd"], "runtime": "onnxruntime"}'])
def test_requests_of_any_form_are_answered_and_the_agent_lives_on(port, device, tiny, body):
    status, answer = ask(port, "POST", "/measure", body)
    assert status == 200 and json.loads(answer)["failed"] in ("usage", "device")
    assert device.measure([tiny], seconds_each=SHORT)[0].median > 0


def test_what_is_too_large_is_refused_before_it_is_read(packed, tmp_path):
    large = tmp_path / "large.onnx"
    onnx.save(linear_model(1024), large)
    with running(packed, "--most-mb", "1") as (_, port):
        device = open_device(f"agent://127.0.0.1:{port}")
        with pytest.raises(PolicyFailure, match="at most"):
            device.measure([large], seconds_each=SHORT)
        with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
            head = f"PUT /blobs/{64 * '0'} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {2**40}\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.0 413")


def external(location):
    """A model whose weight lies in another file."""
    model = linear_model(8)
    weight = model.graph.initializer[0]
    external_data_helper.set_external_data(weight, location=location, offset=0, length=256)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    return model


def test_a_file_cannot_read_the_devices_files(port, device, tiny, tmp_path):
    """External data would be read from wherever the file says; the agent sees to it whatever the other side has checked."""
    (tmp_path / "secret").write_bytes(bytes(64 * 4))
    path = tmp_path / "reads.onnx"
    path.write_bytes(external(str(tmp_path / "secret")).SerializeToString())
    with pytest.raises(PolicyFailure, match=r"reads\.onnx"):
        device.measure([path], seconds_each=SHORT)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ask(port, "PUT", f"/blobs/{digest}", path.read_bytes())[0] == 201
    request = {"models": [digest], "model": digest, "runtime": "onnxruntime", "seconds_each": 0.1, "fewest_rounds": 6, "most_s": 9.0}
    assert "weights itself" in json.loads(ask(port, "POST", "/measure", json.dumps(request))[1])["error"]
    assert device.measure_many([path.read_bytes(), tiny.read_bytes()], seconds_each=0.01)[0] is None


def nested(model):
    """The same inside a branch of a condition, as a constant."""
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=model.graph.initializer[0])],
        "then",
        [],
        [helper.make_tensor_value_info("c", 1, [8, 8])],
    )
    condition = helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=then)
    graph = helper.make_graph([condition], "outer", [helper.make_tensor_value_info("yes", TensorProto.BOOL, [])], list(model.graph.output))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def overlong(model):
    """The same with the length of the word location spelt in two bytes, which a runtime reads all the same."""
    content = model.SerializeToString()
    at = content.index(b"\n\x08location")
    return content[:at] + b"\n\x88\x00location" + content[at + 10 :]


@pytest.mark.parametrize(
    ("content", "elsewhere"),
    [
        (linear_model(8).SerializeToString(), False),
        (external("other").SerializeToString(), True),
        (nested(external("other")).SerializeToString(), True),
        (nested(linear_model(8)).SerializeToString(), False),
        (overlong(external("other")), True),
        (linear_model(8).SerializeToString()[:-3], True),
        (b"\x18\x00\x00\x00ORTM" + bytes(64), True),
        (b"no model at all", True),
        (b"\xff" * 100, True),
    ],
    ids=["sound", "external", "nested external", "nested", "overlong", "cut off", "another format", "text", "endless number"],
)
def test_what_a_file_refers_to_is_read_without_onnx(content, elsewhere):
    assert refers_elsewhere(content) is elsewhere


@pytest.mark.parametrize(("most_mb", "works"), [("1024", False), ("8192", True)])
def test_a_file_takes_no_more_memory_than_the_agent_allows(packed, tmp_path, most_mb, works):
    size = numpy_helper.from_array(np.array([20_000, 20_000]), "size")
    nodes = [helper.make_node("Expand", ["x", "size"], ["wide"]), helper.make_node("ReduceMax", ["wide"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy")
    graph = helper.make_graph(nodes, "hungry", [x], [y], [size])
    path = tmp_path / "hungry.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with running(packed, "--most-memory-mb", most_mb) as (_, port):
        device = open_device(f"agent://127.0.0.1:{port}")
        with contextlib.nullcontext() if works else pytest.raises(PolicyFailure, match=r"hungry\.onnx|crashed"):
            assert device.run(path, [(np.ones((1, 1), np.float32),)]).tolist() == [[1.0]]


def test_a_damaged_file_fails_and_not_the_device(device, tiny, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(PolicyFailure, match=r"broken\.onnx is no sound ONNX model"):
        device.measure([tiny, broken], seconds_each=SHORT)
    with pytest.raises(PolicyFailure, match=r"tiny\.onnx"):
        device.run(tiny, [(np.zeros((1, 3), np.float32),)])
    assert device.measure([tiny], seconds_each=SHORT)[0].median > 0


def test_an_agent_that_is_killed_while_it_measures_and_started_again_measures_again(packed, tiny):
    found = []
    with running(packed) as (process, port):
        device = open_device(f"agent://127.0.0.1:{port}")
        device.measure([tiny], seconds_each=SHORT)
        asking = threading.Thread(target=lambda: found.extend(device.measure([tiny], seconds_each=3.0)))
        asking.start()
        time.sleep(1.0)
        process.kill()
    with running(packed, port=port):
        asking.join(60.0)
    assert found and found[0].median > 0


def test_an_agent_that_is_gone_is_told(packed, tiny, monkeypatch):
    told = []
    monkeypatch.setattr(remote, "PAUSES_S", (0.1, 0.2))
    monkeypatch.setattr(remote, "LONG_PAUSE_S", 0.2)
    with running(packed) as (_, port):
        device = open_device(f"agent://127.0.0.1:{port}")
    device.say = told.append
    with pytest.raises(DeviceUnavailable, match="does not answer") as error:
        device.measure([tiny], seconds_each=SHORT)
    assert error.value.hint
    (waiting,) = told
    assert "does not answer" in waiting and "trying again" in waiting
    started = time.monotonic()
    with pytest.raises(DeviceUnavailable, match="does not answer"):
        open_device(f"agent://127.0.0.1:{port}")
    assert time.monotonic() - started < 5.0, "at first there is no reason to wait"


def test_a_connection_that_has_died_silently_is_noticed(monkeypatch):
    """Half open: the other side took the request, and will never say anything."""
    monkeypatch.setattr(remote, "SILENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        started = time.monotonic()
        with pytest.raises(DeviceUnavailable, match="does not answer"):
            open_device(f"agent://127.0.0.1:{listening.getsockname()[1]}")
        assert time.monotonic() - started < 5.0


@contextlib.contextmanager
def served(work):
    """An agent in this process, whose measuring is `work`."""
    servers, ready = [], threading.Event()

    def told(server):
        servers.append(server)
        ready.set()

    thread = threading.Thread(target=lambda: service.serve("127.0.0.1", 0, TOKEN.encode(), service.Limits(), ready=told))
    thread.start()
    ready.wait(10.0)
    servers[0].agent.measure = work
    try:
        yield servers[0].server_address[1]
    finally:
        servers[0].shutdown()
        thread.join(10.0)


def test_signs_of_life_keep_a_long_measurement_alive(tiny, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_S", 2.0)
    monkeypatch.setattr(http_side, "HEARTBEAT_S", 0.2)
    rounds = {"rounds": [[[1e-3] * 5] * 12], "firsts": [1e-3], "busy": 1.0, "environment": {}}
    with served(lambda request: time.sleep(5.0) or rounds) as port:
        assert open_device(f"agent://127.0.0.1:{port}").measure([tiny])[0].median == 1e-3


def test_an_agent_of_another_version_is_told(monkeypatch):
    monkeypatch.setattr(service, "PROTOCOL", service.PROTOCOL + 1)
    with served(None) as port, pytest.raises(DeviceUnavailable, match="speaks version") as error:
        open_device(f"agent://127.0.0.1:{port}")
    assert "--pack" in error.value.hint


def test_more_connections_than_are_good_for_it_are_dropped(monkeypatch):
    monkeypatch.setattr(http_side, "MOST_CONNECTIONS", 2)
    with served(None) as port, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5.0)) for _ in range(2)]
        assert eventually(lambda: not opens(port))
        for connection in idle:
            connection.close()
        assert eventually(lambda: opens(port))


def opens(port):
    try:
        return open_device(f"agent://127.0.0.1:{port}").profile.runtime == "onnxruntime"
    except DeviceUnavailable:
        return False


def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def test_a_stranger_who_keeps_talking_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_side, "STRANGER_S", 1.0)
    with served(None) as port, socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 20.0:
                connection.sendall(b"X")
                time.sleep(0.2)
        assert time.monotonic() - started < 10.0


def test_a_file_may_take_longer_to_send_than_a_connection_may_be_silent(tmp_path, monkeypatch):
    """Over a slow line: what counts is that something moves."""
    monkeypatch.setattr(remote, "SILENCE_S", 4.0)
    keep = Blobs.keep

    def slowly(self, digest, pieces, n):
        return keep(self, digest, (time.sleep(0.02) or piece for piece in pieces), n)

    monkeypatch.setattr(Blobs, "keep", slowly)
    large = tmp_path / "large.onnx"
    onnx.save(linear_model(3072), large)
    rounds = {"rounds": [[[1e-3] * 5] * 12], "firsts": [1e-3], "busy": 1.0, "environment": {}}
    with served(lambda request: rounds) as port:
        device = open_device(f"agent://127.0.0.1:{port}")
        started = time.monotonic()
        assert device.measure([large])[0].median == 1e-3
        assert time.monotonic() - started > 8.0, "or the test shows nothing"


def test_a_device_that_is_gone_is_still_described(packed, tiny):
    with running(packed) as (_, port):
        device = open_device(f"agent://127.0.0.1:{port}")
    assert device.environment()["onnxruntime"]


@pytest.mark.parametrize("token", ["two lines\nthat are a token", "kurz", "nicht in ASCII geschrieben: ß", ""])
def test_what_is_no_token_is_said_and_not_shown(monkeypatch, token):
    monkeypatch.setenv("AUTOCOMPRESS_TOKEN", token)
    with pytest.raises(UsageError) as error:
        open_device("agent://127.0.0.1:1")
    assert not token or token not in error.value.message + error.value.hint


def test_a_token_file_that_others_can_read_is_refused_by_the_agent(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOCOMPRESS_TOKEN")
    file = tmp_path / "token"
    file.write_text("a token that is long enough")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="yours alone"):
        token_of(file, make=True)
    assert token_of(file) == b"a token that is long enough", "a copy is its owner's business"


def test_an_agent_that_is_told_to_stop_leaves_nothing_behind(packed, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running(packed) as (process, port):
        open_device(f"agent://127.0.0.1:{port}").measure([tiny], seconds_each=SHORT)
        assert list(tmp_path.glob("autocompress-agent-*"))
        process.terminate()
        assert process.wait(20.0) == 0
    assert not list(tmp_path.glob("autocompress-agent-*"))


def test_an_agent_that_was_killed_is_cleaned_up_after_by_the_next(tmp_path):
    gone, alive, other = (tmp_path / f"{service.FOLDER}{name}-x" for name in (2**22 + 1, os.getpid(), "notes"))
    for folder in (gone, alive, other):
        (folder / "blobs").mkdir(parents=True)
    service._sweep(tmp_path)
    assert (gone.exists(), alive.exists(), other.exists()) == (False, True, True)


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    blobs, contents = Blobs(tmp_path, most_bytes=25), [bytes([n]) * 10 for n in range(3)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    for age, (digest, content) in enumerate(zip(digests[:2], contents, strict=False)):
        assert blobs.keep(digest, iter([content]), len(content))
        os.utime(tmp_path / digest, (1000 + age, 1000 + age))
    assert blobs.path(digests[0]).read_bytes() == contents[0]
    assert blobs.keep(digests[2], iter([contents[2][:3], contents[2][3:]]), 10)
    with pytest.raises(Missing) as missing:
        blobs.paths(digests)
    assert missing.value.args == (digests[1],)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([digests[0], digests[2]])


def test_a_full_disk_makes_room_too(tmp_path, monkeypatch):
    """Of small devices it often is a part of their memory, and less than what an agent may keep."""
    blobs, contents = Blobs(tmp_path, most_bytes=10**9), [bytes([n]) * 10 for n in range(3)]

    def usage(folder):
        kept = sum(path.stat().st_size for path in tmp_path.iterdir())
        return SimpleNamespace(free=blob_store.LEAST_FREE + 25 - kept)

    monkeypatch.setattr(blob_store.shutil, "disk_usage", usage)
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    for age, (digest, content) in enumerate(zip(digests, contents, strict=True)):
        assert blobs.keep(digest, iter([content]), len(content))
        os.utime(tmp_path / digest, (1000 + age, 1000 + age))
    with pytest.raises(Missing) as missing:
        blobs.paths(digests)
    assert missing.value.args == (digests[0],)


def test_the_agent_is_one_file_that_says_the_same_each_time(packed, tmp_path):
    pack(tmp_path / "again.pyz")
    assert (tmp_path / "again.pyz").read_bytes() == packed.read_bytes()
    assert packed.stat().st_size < 100_000
    told = subprocess.run([sys.executable, str(packed), "--help"], capture_output=True, text=True, check=True).stdout
    assert "--token-file" in told
    refused = subprocess.run([sys.executable, str(packed), "--token", "secret"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2, "a token in an argument is for all to see"


def test_an_agent_is_packed_by_the_command_line(tmp_path, capsys):
    assert cli.main(["agent", "--pack", str(tmp_path / "agent.pyz")]) == 0
    assert "python3 agent.pyz" in capsys.readouterr().out
    assert (tmp_path / "agent.pyz").is_file()
