from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import time

import pytest

import autocompress

HEAVY = {"torch", "torchvision", "optuna", "onnxruntime", "sklearn", "plotly", "matplotlib", "scipy"}
LIGHT_MODULES = [
    "errors",
    "units",
    "record",
    "policy",
    "records",
    "results",
    "ranking.front",
    "report.view",
    "report.tables",
    "task",
    "system.run_folder",
    "references",
    "commands.terminal",
    "system.progress",
    "commands.doctor",
    "cli",
]


def loaded(program):
    """Heavy packages that a program has loaded at its end, in a process of its own."""
    report = f"\nimport sys; print('LOADED', *({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_names_are_sorted_few_and_importable():
    assert autocompress.__all__ == sorted(autocompress.__all__)
    assert len(set(autocompress.__all__)) == len(autocompress.__all__) <= 25
    for name in autocompress.__all__:
        assert getattr(autocompress, name) is not None
        assert name in dir(autocompress)


def test_every_public_name_has_a_home_that_says_what_it_is():
    for name in autocompress.__all__:
        assert getattr(autocompress, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="serach"):
        _ = autocompress.serach


def test_the_version_is_the_installed_one():
    assert autocompress.__version__ == importlib.metadata.version("autocompress")


@pytest.mark.parametrize(
    "program",
    [
        "import autocompress; autocompress.Policy; autocompress.Budget; autocompress.Measurement",
        "from autocompress.cli import main; assert main(['--help']) == 0",
        "from autocompress.cli import main; assert main(['search', '--help']) == 0",
        "from autocompress.cli import main; assert main(['show', '/absent']) == 2",
        "from autocompress.cli import main; assert main(['export', '.', '--format', 'foo', '--out', 'x']) == 2",
        "\n".join(f"import autocompress.{name}" for name in LIGHT_MODULES),
    ],
)
def test_what_needs_no_torch_loads_none(program):
    assert loaded(program) == set()


def test_help_answers_at_once():
    """The fastest of five: the others may have waited for the machine."""
    spent = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "autocompress", "--help"], capture_output=True, check=True)
        spent.append(time.perf_counter() - started)
    assert min(spent) < 0.5


def test_a_finished_search_is_read_without_torch(tmp_path):
    program = (
        "from autocompress.cli import main; assert main(['show', 'tests/fixtures']) == 0; assert main(['explain', 'tests/fixtures']) == 0"
    )
    assert loaded(program) & {"torch", "optuna"} == set()


def test_every_module_has_a_docstring():
    for info in pkgutil.walk_packages(autocompress.__path__, "autocompress."):
        spec = importlib.util.find_spec(info.name)
        source = spec.loader.get_source(info.name)
        assert source.startswith('"""'), info.name
