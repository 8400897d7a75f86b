"""Silence for code that prints and warns about its own internals."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(logger: str | None = None) -> Iterator[None]:
    """Nothing is printed or warned of meanwhile, and this logger reports errors only."""
    named = logging.getLogger(logger) if logger is not None else None
    level = named.level if named is not None else logging.NOTSET
    try:
        if named is not None:
            named.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if named is not None:
            named.setLevel(level)
