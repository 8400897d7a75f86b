"""The secret that whoever asks an agent must know."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from autocompress.errors import UsageError, one_line

VARIABLE = "AUTOCOMPRESS_TOKEN"
LEAST_TOKEN = 16
TOKEN = re.compile(rf"[\x20-\x7e]{{{LEAST_TOKEN},}}")


def token_of(file: Path | None, *, make: bool = False) -> bytes:
    """From AUTOCOMPRESS_TOKEN, or from a file, which an agent makes where it is not there: never from arguments, which everybody can list.

    Raises UsageError where there is none, it is no token, or an agent's file is not this user's alone.
    """
    given = os.environ.get(VARIABLE)
    if given is None and file is not None:
        try:
            given = _made(file) if make else file.read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise UsageError(f"the token in {str(file)!r} cannot be read: {one_line(error)}", hint="copy the agent's token file") from None
    if given is None:
        raise UsageError("an agent demands a token", hint="set AUTOCOMPRESS_TOKEN_FILE to a copy of its token file, or AUTOCOMPRESS_TOKEN")
    token = given.strip()
    if not TOKEN.fullmatch(token):
        raise UsageError(f"a token must be one line of {LEAST_TOKEN} or more printable ASCII characters", hint="let the agent make one")
    return token.encode()


def _made(file: Path) -> str:
    """The token in a file that nobody else may read; a new one where there is no file."""
    with contextlib.suppress(FileExistsError), os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
        new.write(secrets.token_urlsafe(32) + "\n")
    known = file.stat()
    if known.st_uid != os.getuid() or known.st_mode & 0o077:
        raise UsageError(f"the token file {str(file)!r} must be yours alone", hint=f"chmod 600 {file}, or name another one")
    return file.read_text(encoding="ascii")
