"""An agent in another network: a link that is slow, loses packets, and breaks in the middle of a measurement. Needs root and `ip`."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from autocompress.devices import open_device, remote
from autocompress.devices.pack import pack
from autocompress.errors import DeviceUnavailable

TOKEN = "a token that is long enough"
HERE, THERE, PORT = "10.231.7.1", "10.231.7.2", 7878
SPACE, LINK = f"acn{os.getpid()}", f"acl{os.getpid()}"[:14]
POOR = ("delay", "40ms", "10ms", "loss", "3%")


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture
def link():
    """Two namespaces and a link between them; gives how a command is run in the other one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    try:
        ip("netns", "add", SPACE)
        ip("link", "add", LINK, "type", "veth", "peer", "name", "there", "netns", SPACE)
    except subprocess.CalledProcessError as error:
        ip("netns", "del", SPACE, check=False)
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("addr", "add", f"{HERE}/30", "dev", LINK)
        ip("link", "set", LINK, "up")
        ip("-n", SPACE, "addr", "add", f"{THERE}/30", "dev", "there")
        for device in ("there", "lo"):
            ip("-n", SPACE, "link", "set", device, "up")
        yield ["ip", "netns", "exec", SPACE]
    finally:
        ip("link", "del", LINK, check=False)
        ip("netns", "del", SPACE, check=False)


@pytest.fixture
def device(link, tmp_path, monkeypatch):
    """The agent in the other namespace."""
    monkeypatch.setenv("AUTOCOMPRESS_TOKEN", TOKEN)
    pack(tmp_path / "agent.pyz")
    command = [*link, sys.executable, str(tmp_path / "agent.pyz"), "--host", "0.0.0.0", "--port", str(PORT)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert "listening" in process.stderr.readline()
            yield open_device(f"agent://{THERE}:{PORT}")
        finally:
            process.kill()


def test_over_a_slow_link_that_loses_packets(device, link, tiny):
    poor = subprocess.run(
        [*link, "tc", "qdisc", "add", "dev", "there", "root", "netem", *POOR], capture_output=True, text=True, check=False
    )
    if poor.returncode:
        pytest.skip(f"this kernel cannot make a link slow: {poor.stderr.strip()}")
    (measured,) = device.measure([tiny], seconds_each=0.1)
    assert 0 < measured.median < 5e-3, "what the network takes is not part of it"


def test_a_link_that_breaks_in_the_middle_of_a_measurement(device, tiny, monkeypatch):
    """Nobody closes the connection: that it is dead shows only in that nothing comes any more."""
    monkeypatch.setattr(remote, "SILENCE_S", 7.0)
    found, sent, exchange = [], [], remote.RemoteCpu._exchange
    monkeypatch.setattr(remote.RemoteCpu, "_exchange", lambda self, *what: sent.append(what[0]) or exchange(self, *what))
    asking = threading.Thread(target=lambda: found.extend(device.measure([tiny], seconds_each=6.0)))
    asking.start()
    time.sleep(2.0)
    ip("link", "set", LINK, "down")
    time.sleep(6.0)
    ip("link", "set", LINK, "up")
    asking.join(90.0)
    assert sent.count("POST") >= 2, "the first answer never came"
    assert found and 0 < found[0].median < 5e-3


def test_an_agent_that_listens_on_its_own_host_only_is_not_reached_from_outside(link, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_TOKEN", TOKEN)
    monkeypatch.setattr(remote, "SILENCE_S", 2.0)
    pack(tmp_path / "agent.pyz")
    command = [*link, sys.executable, str(tmp_path / "agent.pyz"), "--port", str(PORT)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        assert "127.0.0.1" in process.stderr.readline()
        with pytest.raises(DeviceUnavailable, match="does not answer"):
            open_device(f"agent://{THERE}:{PORT}")
