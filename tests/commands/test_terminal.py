from __future__ import annotations

import json
import subprocess
import sys

import pytest

from autocompress.commands.terminal import complain, emit, emit_json, emit_record, report_error
from autocompress.errors import AutocompressError, InfeasibleBudget, RunFolderError, UsageError
from autocompress.report.tables import plain_table


def test_results_go_to_stdout_and_complaints_to_stderr(capsys):
    emit("result\n\n")
    complain("one", "", "two")
    assert capsys.readouterr() == ("result\n", "one\ntwo\n")


def test_json_is_strict_and_carries_its_schema(capsys):
    emit_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {1: (True, None)}, "path": type(sys).__name__})

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert content == {"schema": 1, "ok": True, "a": None, "b": [None, 1.5], "c": {"1": [True, None]}, "path": "module"}


@pytest.mark.parametrize(
    "error", [UsageError("a must be b", hint="write b"), RunFolderError("full", hint="free space"), AutocompressError("x")]
)
def test_an_error_is_a_sentence_and_a_hint(capsys, error):
    report_error(error, as_json=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else "")


def test_an_error_as_json(capsys):
    report_error(InfeasibleBudget("none", hint="more", smallest_latency_s=float("nan"), binds="convs"), as_json=True)
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "schema": 1,
        "ok": False,
        "error": {"code": 3, "kind": "InfeasibleBudget", "message": "none", "hint": "more", "smallest_latency_s": None, "binds": "convs"},
    }


def test_numbers_are_left_out_beside_the_same_in_words(capsys):
    emit_record({"latency": "2.2 ms", "latency_s": 0.0022, "size": "4 MB", "size_bytes": 4_000_000, "elapsed_s": 3.5})
    assert capsys.readouterr().out == "latency: 2.2 ms\nsize: 4 MB\nelapsed s: 3.5\n"


def test_records_for_people(capsys):
    emit_record({
        "plain_value": 0.123456, "flag": True, "nothing": None, "names": ["a", "b"], "empty": [],
        "long": ["x" * 50, "y"], "inner": {"k": [1, 2]}, "rows": [{"layer": "[red]a", "n_bytes": 3}, {"layer": ":boat:"}],
    })  # fmt: skip
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:8] == ["plain value: 0.1235", "flag: yes", "nothing: -", "names: a, b", "empty: none", "long:", "  " + "x" * 50, "  y"]
    assert lines[8:10] == ["inner:", "  k: 1, 2"]
    text = "\n".join(lines[10:])
    assert "[red]a" in text and ":boat:" in text and "n bytes" in text


@pytest.mark.parametrize("width", [40, 80, 400])
def test_numbers_of_a_record_are_never_cut(capsys, monkeypatch, width):
    monkeypatch.setattr("autocompress.commands.terminal.PIPE_WIDTH", width)
    rows = [
        {"name": 120 * "n", "kind": "conv", "size": 131072, "group": 90 * "g"},
        {"name": "b", "kind": "linear", "size": 7, "group": None},
    ]
    emit_record({"layers": rows})
    lines = capsys.readouterr().out.splitlines()
    assert sum("131072" in line for line in lines) == 1
    (row,) = (line for line in lines if 120 * "n" in line)
    assert "131072" in row and row.endswith(90 * "g"), "in a pipe each record is a line"


def test_tables_in_a_pipe_are_plain_and_wide(capsys):
    table = plain_table("a", "b")
    table.add_row("x" * 60, "[bold]" + "y" * 80, style="bold green")
    emit(table)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "x" * 60 in out and "[bold]" + "y" * 80 in out


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_the_terminal_lacks_become_question_marks(encoding):
    program = "from autocompress.cli import _never_fail_on_encoding as f; from autocompress.report.tables import plain_table\n"
    program += "from autocompress.commands.terminal import emit; f(); t = plain_table('a'); t.add_row('ü—'); emit(t); emit('×')"
    environment = {"PYTHONIOENCODING": encoding, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    assert ("ü—" in done.stdout.decode(encoding)) is (encoding == "utf-8")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["emit('line\\n' * 100000)", "emit('x'); emit('line\\n' * 100000)"])
def test_a_reader_that_leaves_early_ends_the_command_quietly(module):
    program = f"from autocompress.commands.terminal import emit\n{module}\nemit('more')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
