"""The folder for what can be made again: latencies of operators, and decoded images."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from pathlib import Path

FREE_SPACE = "free space, or name another folder: export XDG_CACHE_HOME=DIR"
"""Cure of a cache that is full."""


def cache_folder() -> Path:
    """By the XDG base directories; a temporary folder where home cannot be written."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "autocompress"
    with contextlib.suppress(OSError, RuntimeError):  # what Path.home() raises for a user who has none
        folder = Path.home() / ".cache" / "autocompress"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"autocompress-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    mine = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()  # anybody can make a folder there
    return folder if mine else _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="autocompress-"))
