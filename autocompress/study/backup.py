"""A sound copy of a search's database beside it: of trials that took an hour, one damaged block must not be the end."""

from __future__ import annotations

import datetime
import os
import shlex
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from autocompress.errors import RunFolderError, one_line
from autocompress.system.run_folder import PARTIAL, writing

BACKUP = "study.backup.db"


def back_up(database: Path) -> None:
    """Copy a database of SQLite to BACKUP beside it, unless the copy would be damaged: then the one before stays.

    Raises RunFolderError where it cannot be written.
    """
    if not database.is_file():  # taken away: the copy is all there is
        return
    target = database.with_name(BACKUP)
    with writing(target):
        descriptor, name = tempfile.mkstemp(prefix=f".{BACKUP}.", suffix=PARTIAL, dir=database.parent)
        os.close(descriptor)
    copy = Path(name)
    try:
        if _is_copied(database, copy):
            with writing(target):
                copy.chmod(0o644)
                copy.replace(target)
    except sqlite3.OperationalError as error:
        raise RunFolderError(f"{str(target)!r} cannot be written: {one_line(error)}", hint="free space, then --resume") from None
    finally:
        copy.unlink(missing_ok=True)


def _is_copied(database: Path, copy: Path) -> bool:
    """Whether the copy is sound; SQLite itself waits until it is on the disk."""
    try:
        with closing(sqlite3.connect(database.resolve().as_uri() + "?mode=rw", uri=True)) as source, closing(sqlite3.connect(copy)) as into:
            source.backup(into)
            (verdict,) = into.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:  # the disk is full
        raise
    except sqlite3.DatabaseError:
        return False
    return bool(verdict == "ok")


def how_to_restore(database: Path) -> str:
    """What to do about a damaged database."""
    copy = database.with_name(BACKUP)
    if not copy.is_file():
        return "restore it from a copy, or start again with another --out"
    when = datetime.datetime.fromtimestamp(copy.stat().st_mtime).isoformat(" ", timespec="seconds")
    to = shlex.quote(str(database))
    rest = f"{shlex.quote(f'{database}-')}*"  # what SQLite had left of the damaged one would change the copy
    return f"this puts it back as it was at {when}: rm -f {rest} && cp {shlex.quote(str(copy))} {to}"
