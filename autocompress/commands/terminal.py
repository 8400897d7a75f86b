"""How the command line speaks: data on stdout, everything else on stderr, errors as one sentence or as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autocompress.errors import AutocompressError, InfeasibleBudget
from autocompress.units import finite

if TYPE_CHECKING:
    from rich.console import RenderableType

WHOLE = 2000
"""Columns of one that is a list of records, at most: a line each, for who reads it with grep."""
LONG = 12
"""Letters of words that may fold where a table is too wide."""
PIPE_WIDTH = 180
"""Columns of a table that goes to a file or a pipe."""


def emit(content: str | RenderableType) -> None:
    """Print a result to stdout. When the reader has closed the pipe (`| head -1`) the command ends quietly."""
    text = content if isinstance(content, str) else rendered(content)
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:
        # Else the interpreter's own flush at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def aside() -> contextlib.AbstractContextManager[object]:
    """While a user's own code may run: what it prints is no result of ours."""
    return contextlib.redirect_stdout(sys.stderr)


def emit_json(content: Mapping[str, Any]) -> None:
    """Print a result as JSON with its schema version. NaN and infinity become null."""
    emit(json.dumps(finite({"schema": 1, "ok": True} | dict(content)), indent=1, allow_nan=False, default=str))


def rendered(content: RenderableType, *, whole: bool = False) -> str:
    """A rich table as text: coloured and as wide as the terminal there, plain and wide elsewhere; `whole`, as wide as it needs to be."""
    from rich.console import Console

    live = sys.stdout.isatty()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)
    console = Console(file=buffer, width=terminal_width(), force_terminal=live, highlight=False, markup=False, emoji=False)
    if whole and not live:
        console.width = max(console.width, console.measure(content, options=console.options.update_width(WHOLE)).maximum)
    console.print(content)
    buffer.seek(0)
    return "\n".join(line.rstrip() for line in buffer.read().splitlines()).strip("\n")


def terminal_width() -> int:
    """Columns of stdout."""
    return shutil.get_terminal_size((PIPE_WIDTH, 24)).columns if sys.stdout.isatty() else PIPE_WIDTH


def emit_record(content: Mapping[str, Any]) -> None:
    """Print a nested record for a person: plain values as lines, lists of records as tables, in their order.

    Raw seconds and bytes (`latency_s`, `size_bytes`) are left out beside the same in words (`latency`, `size`).
    """
    for key, value in content.items():
        if any(key.endswith(unit) and key.removesuffix(unit) in content for unit in ("_s", "_bytes")):
            continue
        name = key.replace("_", " ")
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            emit(f"\n{name}")
            emit(rendered(_table(value), whole=True))
        elif isinstance(value, Mapping):
            emit(f"{name}:")
            for inner, item in value.items():
                emit(f"  {inner}: {_word(item)}")
        elif isinstance(value, (list, tuple)) and value and max(len(str(item)) for item in value) > 40:
            emit(f"{name}:")
            for item in value:
                emit(f"  {_word(item)}")
        else:
            emit(f"{name}: {_word(value)}")


def _table(records: list[Mapping[str, Any]]) -> RenderableType:
    from rich.text import Text

    from autocompress.report.tables import plain_table

    columns = list(dict.fromkeys(key for record in records for key in record))
    words = [column for column in columns if any(isinstance(record.get(column), str) for record in records)]
    names = [name for name in words if max(len(_word(record.get(name, ""))) for record in records) > LONG]
    table = plain_table(*(column.replace("_", " ") for column in columns), folding=[name.replace("_", " ") for name in names])
    for record in records:
        table.add_row(*(Text(_word(record.get(column, ""))) for column in columns))
    return table


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(_word(item) for item in value) or "none" if isinstance(value, (list, tuple)) else str(value)


def report_error(error: AutocompressError, *, as_json: bool) -> None:
    """One sentence and a hint on stderr, or the same as JSON on stdout."""
    if as_json:
        facts: dict[str, Any] = {
            "code": error.exit_code,
            "kind": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
        }
        if isinstance(error, InfeasibleBudget):
            facts |= {"smallest_latency_s": error.smallest_latency_s, "binds": error.binds}
        emit(json.dumps(finite({"schema": 1, "ok": False, "error": facts}), indent=1))
        return
    complain(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "")


def complain(*lines: str) -> None:
    """Lines on stderr; a closed stderr is no error."""
    try:
        for line in lines:
            if line:
                print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return
