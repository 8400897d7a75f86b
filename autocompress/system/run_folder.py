"""The folder of one search: who may write it, and how files get into it whole or not at all."""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autocompress.errors import RunFolderError, UsageError
from autocompress.units import format_size

LOCK, FRONT, REPORT, PARETO = ".lock", "front.json", "report.html", "pareto.png"
PARTIAL = ".partial"
"""Ends the names of files while they are written; with a dot before, the file's own name, and what makes it unique."""
WRITTEN_IN = ("", "models")
"""Where in a run folder files are written that nothing removes with their folder."""
POLICY_FILES, MANY_POLICIES = 3, 20
"""Files of weights that a policy keeps: as they were trained, as they ship, and in the runtime's format; and policies of a long search."""


NETWORK = frozenset({"afs", "cifs", "fuse.sshfs", "nfs", "nfs4", "smb3", "smbfs"})
"""File systems of other machines."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunFolderError when the disk is full or `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", hint="free space, or choose another place (--out)"
        ) from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by a file with this content; after a crash there is the old file or the new one.

    Raises RunFolderError when the disk is full or the folder cannot be written.
    """
    payload = content.encode() if isinstance(content, str) else content
    with writing(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
            _sync(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _sync(folder: Path) -> None:
    """A replaced file is the new one after a power cut only once its folder is on the disk; not every file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remember_own(path: Path) -> None:
    """Let `is_own_file` know a file that this search has written, by its content: a folder may be copied, and come back changed."""
    with suppress(OSError, RuntimeError):  # without a home a resumed search asks for what this one was told
        folder = _own_files()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / _digest(path)).touch()


def is_own_file(path: Path) -> bool:
    """Whether a search of this user on this machine has written a file of this content."""
    with suppress(OSError, RuntimeError):
        folder = _own_files()
        known = folder.stat()
        is_private = known.st_uid == os.getuid() and not known.st_mode & 0o022
        return is_private and (folder / _digest(path)).is_file()
    return False


def _own_files() -> Path:
    """By the XDG base directories; raises RuntimeError for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "autocompress" / "own"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises RunFolderError when another process holds it.

    The kernel drops the lock when its holder dies, so a killed search leaves nothing to clean up.
    """
    try:
        str(run).encode()
    except UnicodeEncodeError:  # runtimes, reports and JSON take text
        raise UsageError(f"the path of a run folder must be text in UTF-8, but is {str(run)!r}", hint="choose another --out") from None
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run))
        # not through a link, which in a folder of somebody else's leads elsewhere
        file = os.fdopen(os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "a+")
    except OSError as error:
        raise UsageError(f"the run folder {str(run)!r} cannot be written: {error.strerror}", hint="choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunFolderError(
                f"the run folder {str(run)!r} is in use by {file.read().strip() or 'another process'}",
                hint="wait for it, or choose another --out",
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"the run folder {str(run)!r} cannot be locked: {error.strerror}",
                hint="file systems over a network may have no locks: choose an --out on a disk of this machine",
            ) from None
        with writing(run):
            _sweep(run)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _sweep(run: Path) -> None:
    """Remove what `write_atomically` left where it was killed; only who holds the folder writes into it."""
    for folder in WRITTEN_IN:
        for left in (run / folder).glob(f".*{PARTIAL}*"):
            if left.is_file():
                left.unlink(missing_ok=True)


def require_space(run: Path, model_bytes: int, *, begun: bool = False) -> str:
    """A warning where fewer than MANY_POLICIES fit on the disk, else nothing. Raises RunFolderError where not even one fits.

    Args:
        begun: of a search that is resumed, which may have little left to write: it is only warned.
        model_bytes: of the original's file. What is kept of a policy takes at most POLICY_FILES times as much.
    """
    free, each = shutil.disk_usage(run).free, POLICY_FILES * model_bytes
    if free < each and not begun:
        raise RunFolderError(
            f"a policy of this model may need {format_size(each)}, but only {format_size(free)} are free in {str(run)!r}",
            hint="free space or choose another --out",
        )
    return f"only {format_size(free)} are free in {run}: this search may fill the disk" if free < MANY_POLICIES * each else ""


def network_warning(run: Path) -> str:
    """A warning where the folder is on another machine, else nothing: SQLite relies on locks that network file systems often lack."""
    import psutil  # slow to import, and of no use to who reads results

    place, mounts = run.resolve(), []
    with suppress(OSError, psutil.Error):  # where the system does not say
        mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    innermost = sorted(mounts, key=lambda mount: len(mount.mountpoint))[-1:]  # of several at one place, as autofs has them, the last
    system = innermost[0].fstype if innermost else ""
    if system not in NETWORK:
        return ""
    return f"{run} is on a network file system ({system}), whose locks may fail: an --out on a disk of this machine is safer"


def new_run() -> Path:
    """A folder in the current one that is named by the time."""
    return Path(f"run-{datetime.datetime.now():%Y%m%d-%H%M%S}")


def read_front(run: Path) -> dict[str, Any]:
    """The content of RUN/front.json. Raises UsageError when there is none, RunFolderError when it is damaged."""
    path = run / FRONT
    if not path.is_file():
        raise UsageError(f"{str(run)!r} holds no {FRONT}", hint="give the folder that `autocompress search --out` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{str(path)!r} is damaged: {error}", hint="resume the search: it writes the file again") from None
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise UsageError(
            f"{str(path)!r} must be of schema 1, but is {content.get('schema') if isinstance(content, dict) else None}",
            hint="give a run of this version of autocompress",
        )
    return content
