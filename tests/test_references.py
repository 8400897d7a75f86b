from __future__ import annotations

import sys

import pytest

from autocompress.errors import UsageError
from autocompress.references import absolute_data, absolute_function, call_function, nearest, parse_reference


@pytest.mark.parametrize(
    ("reference", "name", "options"),
    [
        ("digits", "digits", {}),
        ("torchvision:CIFAR10?root=/data/c++ 1", "torchvision:CIFAR10", {"root": "/data/c++ 1"}),
        ("imagefolder:a b?size=32&flip=", "imagefolder:a b", {"size": "32", "flip": ""}),
        ("onnxruntime:cpu?threads=2", "onnxruntime:cpu", {"threads": "2"}),
        ("x?root=%3Fé", "x", {"root": "?é"}),
    ],
)
def test_parts_of_a_reference(reference, name, options):
    assert parse_reference(reference) == (name, options)


@pytest.mark.parametrize("reference", ["", "?", "?a=1"])
def test_a_reference_starts_with_a_name(reference):
    with pytest.raises(UsageError, match="must start with a name"):
        parse_reference(reference)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("digits", "digits"),
        ("python:Data", "python:Data"),
        ("own_package.data:splits", "own_package.data:splits"),
        ("own.py:splits", "{here}/own.py:splits"),
        ("sub/own.py:splits", "{here}/sub/own.py:splits"),
        ("/else where/own.py:splits", "/else where/own.py:splits"),
        ("~/own.py:splits", "{home}/own.py:splits"),
        ("imagefolder:photos?size=32&flip=", "imagefolder:{here}/photos?size=32&flip="),
        ("imagefolder:/photos", "imagefolder:/photos"),
        ("torchvision:MNIST", "torchvision:MNIST?root={here}/data"),
        ("torchvision:MNIST?flip=true&root=sets/c++ %26 100%25", "torchvision:MNIST?root={here}/sets/c++ %26 100%25&flip=true"),
    ],
)
def test_data_means_the_same_in_another_folder(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    absolute = absolute_data(given)
    assert absolute == expected.format(here=tmp_path, home=tmp_path / "home")
    monkeypatch.chdir("/")
    assert absolute_data(absolute) == absolute


@pytest.mark.parametrize("where", ["at import", "when called"])
def test_code_that_exits_is_an_error(tmp_path, where):
    exits = "    raise SystemExit(0)" if where == "when called" else "    pass\nraise SystemExit(0)"
    (tmp_path / "own.py").write_text(f"def build():\n{exits}\n")
    with pytest.raises(UsageError, match="SystemExit"):
        call_function(f"{tmp_path / 'own.py'}:build")


def test_a_function_means_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_function("net.py:build") == f"{tmp_path}/net.py:build"
    assert absolute_function("torchvision:resnet18") == "torchvision:resnet18"


def test_nearest_names():
    assert nearest("resnet19", ["resnet18", "vgg11"]) == "did you mean resnet18?"
    assert nearest("q", ["a", "b"]) == "known: a, b"
    assert nearest("q", [str(i) for i in range(20)]).endswith(", ...")
    assert nearest("q", []) == "there is none to name"


def test_a_function_of_a_file_is_called(tmp_path):
    path = tmp_path / "ein modul ü.py"
    path.write_text("calls = []\ndef made():\n    calls.append(1)\n    return len(calls)\n", encoding="utf-8")
    assert call_function(f"{path}:made") == 1
    assert call_function(f"{path}:made") == 2, "the file is imported once"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a package and a file that imports its neighbour, and the search path of a console script."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "some_nets").mkdir()
    (tmp_path / "some_nets" / "small.py").write_text("def build(): return 'small'")
    (tmp_path / "some_layers.py").write_text("WIDTH = 8")
    (tmp_path / "tabnanny.py").write_text("1 / 0")
    text = "from some_layers import WIDTH\ndef build():\n    import tabnanny, some_nets.small\n    return WIDTH, tabnanny.verbose"
    (tmp_path / "model.py").write_text(text)
    yield tmp_path
    for name in ("some_nets.small", "some_nets", "some_layers"):
        sys.modules.pop(name, None)


def test_a_package_in_the_current_folder_is_found(project, monkeypatch):
    monkeypatch.chdir(project)
    assert call_function("some_nets.small:build") == "small"


def test_a_file_may_import_its_neighbours_early_and_late_but_not_in_place_of_a_library(project):
    assert call_function(f"{project / 'model.py'}:build") == (8, 0)
    assert sys.path.count(str(project)) == 1


def test_a_function_of_a_module_is_called(tmp_path, monkeypatch):
    (tmp_path / "fresh_module.py").write_text("def made(): return 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert call_function("fresh_module:made") == 42
    del sys.modules["fresh_module"]


SOURCES = {
    "fine.py": "value = 3\ndef needs_argument(x): ...\ndef fails(): raise KeyError('lost')\ndef exits(): ...",
    "wordy.py": "def explains(): raise ValueError('first\\nsecond')",
    "syntax.py": "def broken(:",
    "raising.py": "1 / 0",
}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("fine.py:missing", "no function 'missing'"),
        ("fine.py:value", "no function 'value'"),
        ("fine.py:", "no function"),
        ("fine.py:needs_argument", "raised TypeError"),
        ("fine.py:fails", "raised KeyError"),
        ("wordy.py:explains", "raised ValueError: first$"),
        ("syntax.py:broken", "SyntaxError"),
        ("raising.py:f", "ZeroDivisionError"),
        ("absent.py:f", "does not exist"),
        ("no_such_module_anywhere:f", "does not import"),
        ("raising:f", "ZeroDivisionError"),
        ("syntax:f", "SyntaxError"),
        (":f", "does not import"),
        (".relative:f", "does not import"),
    ],
)
def test_what_cannot_be_called_is_a_usage_error(tmp_path, monkeypatch, reference, message):
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=message):
        call_function(reference)


def test_a_file_that_failed_is_imported_again_once_mended(tmp_path):
    path = tmp_path / "mended.py"
    path.write_text("1 / 0")
    with pytest.raises(UsageError):
        call_function(f"{path}:f")
    path.write_text("def f(): return 'well'    # mended")
    assert call_function(f"{path}:f") == "well"


def test_the_functions_own_usage_error_passes(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from autocompress.errors import UsageError\ndef f(): raise UsageError('mine', hint='')")
    with pytest.raises(UsageError, match=r"^mine$"):
        call_function(f"{path}:f")
