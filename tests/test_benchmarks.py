"""The scripts of benchmarks/ are run by hand, and break unseen when what they use is renamed; their results are quoted elsewhere."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
ROW = re.compile(r"\| .* \| \d+\.\d+ % \| \d.*x.* \| \d+ kB \|")
"""Of a table of the README: what a model is, test accuracy, speed-up, size."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_ours_is_there(script):
    imports = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if (node.module or "").startswith("autocompress"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_the_tables_of_the_readme_are_what_was_measured():
    measured = [line for path in (ROOT / "benchmarks" / "results").glob("cifar10_*.md") for line in path.read_text().splitlines()]
    quoted = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if ROW.fullmatch(line)]
    assert len(quoted) > 5
    for name, accuracy, speed, size in quoted:
        parts = f"| {accuracy} |", f"| {speed.partition(',')[0].removesuffix(' noisy')}", f"| {size} |"
        assert any(all(part in line for part in parts) for line in measured), name
