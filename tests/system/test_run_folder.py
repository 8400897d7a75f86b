from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autocompress.errors import RunFolderError, UsageError
from autocompress.system.run_folder import (
    MANY_POLICIES,
    POLICY_FILES,
    is_own_file,
    locked,
    network_warning,
    read_front,
    remember_own,
    require_space,
    write_atomically,
)


@pytest.mark.parametrize("content", ["", "text ü\n", b"\x00\xff" * 1000])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "file ü"
    path.write_text("what was there before")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file ü"], "no temporary file is left"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_disk_without_room_for_one_policy_is_refused_and_one_for_a_few_is_told(tmp_path, monkeypatch):
    def told(free):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
        return require_space(tmp_path, 10**6)

    with pytest.raises(RunFolderError, match=r"may need 3 MB, but only 2 MB are free") as caught:
        told(2 * 10**6)
    assert "--out" in caught.value.hint
    assert "only 2 MB are free" in require_space(tmp_path, 10**6, begun=True), "there may be hardly anything left to write"
    assert "only 3 MB are free" in told(POLICY_FILES * 10**6)
    assert told(POLICY_FILES * MANY_POLICIES * 10**6) == ""


def test_a_folder_of_another_machine_is_told(tmp_path, monkeypatch):
    def mounted(*systems):
        mounts = [SimpleNamespace(mountpoint=str(folder), fstype=system) for folder, system in systems]
        monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
        return network_warning(tmp_path / "run")

    assert mounted(("/", "ext4")) == ""
    assert mounted(("/", "nfs4"), (tmp_path, "ext4")) == "", "the innermost counts"
    assert mounted(("/", "ext4"), (tmp_path.parent, "tmpfs"), (tmp_path, "nfs")).startswith(
        f"{tmp_path / 'run'} is on a network file system (nfs)"
    )
    assert "(nfs4)" in mounted((tmp_path, "autofs"), (tmp_path, "nfs4")), "the later of two at one place"
    assert mounted((tmp_path / "ru", "nfs")) == "", "another folder, though its name begins alike"
    assert mounted() == ""


FILL_DISK = """
import resource, signal, sys
from pathlib import Path
from autocompress.errors import RunFolderError
from autocompress.system.run_folder import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), "x" * 100_000)
except RunFolderError as error:
    print(error.message)
"""


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "front.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FILL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_crash_before_the_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "front.json"
    path.write_text("old")

    def crash(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_being_written_when_a_search_was_killed_is_removed_by_the_next(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Too fast for any cleaning up."""

    def kill(*_):
        raise Killed

    (tmp_path / ".front.json.notours1234").write_text("kept")
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(Path, "replace", kill)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    for path in (tmp_path / "front.json", tmp_path / "models" / "interrupted-1.safetensors"):
        with pytest.raises(Killed):
            write_atomically(path, "{}")
    monkeypatch.undo()
    assert [len(list(folder.iterdir())) for folder in (tmp_path, tmp_path / "models")] == [3, 1]
    with locked(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {".lock", ".front.json.notours1234", "models"}


def test_a_folder_that_is_gone_is_a_run_folder_error(tmp_path):
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_atomically(tmp_path / "absent" / "file", "text")


HOLD = """
import sys
from pathlib import Path
from autocompress.system.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_and_a_killed_one_leaves_it_free(tmp_path):
    run = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid}"), locked(run):
            pass
        holder.kill()
        holder.wait()
    with locked(run), pytest.raises(RunFolderError, match=f"process {os.getpid()}"), locked(run):
        pass
    with locked(run):
        pass


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), locked(tmp_path / place):
        pass


def test_a_path_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be text in UTF-8"), locked(Path(os.fsdecode(bytes(tmp_path) + b"/r\xff"))):
        pass


def test_front_json_reads_back(tmp_path):
    (tmp_path / "front.json").write_text(json.dumps({"schema": 1, "model": "ü"}), encoding="utf-8")
    assert read_front(tmp_path) == {"schema": 1, "model": "ü"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, UsageError),
        (b"", RunFolderError),
        (b'{"schema": 1', RunFolderError),
        (b'{"schema": 1, "model": "\xff"}', RunFolderError),
        (b"[" * 200_000, RunFolderError),
        (b"[]", UsageError),
        (b"{}", UsageError),
        (b'{"schema": 2}', UsageError),
    ],
)
def test_a_missing_damaged_or_foreign_front_json(tmp_path, content, error):
    if content is not None:
        (tmp_path / "front.json").write_bytes(content)
    with pytest.raises(error, match=r"front\.json"):
        read_front(tmp_path)


def test_a_lock_that_cannot_be_written_is_no_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: os.close(descriptor) or Path("/dev/full").open(mode))  # noqa: SIM115
    with pytest.raises(RunFolderError, match="cannot be written"), locked(tmp_path):
        pytest.fail("it was locked")


def test_a_file_system_without_locks_is_not_one_that_is_in_use(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(RunFolderError, match="cannot be locked: No locks available"), locked(tmp_path):
        pass


def test_the_lock_is_no_link_that_leads_elsewhere(tmp_path):
    (tmp_path / "keys").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "keys")
    with pytest.raises(UsageError, match="cannot be written"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "keys").read_text() == "precious"


def test_what_is_ones_own_is_remembered_where_nobody_else_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    file = tmp_path / "task.toml"
    file.write_text("seed = 1")
    assert not is_own_file(file)
    remember_own(file)
    assert is_own_file(file)
    file.write_text("seed = 2")
    assert not is_own_file(file)
    file.write_text("seed = 1")
    (tmp_path / "state" / "autocompress" / "own").chmod(0o777)
    assert not is_own_file(file), "anybody may have put it there"


def test_a_folder_that_may_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    """A colleague's, whose lock was left writable."""
    (tmp_path / ".lock").touch()
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(UsageError, match="cannot be written: Permission denied"), locked(tmp_path):
        raise AssertionError("held")
