"""Write the agent as one file that Python runs, with what it needs of this package and nothing else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from autocompress.system.run_folder import write_atomically

MODULES = (
    "errors", "references", "system.machine", "devices.access", "devices.agent", "devices.blobs", "devices.child", "devices.frames",
    "devices.processes", "devices.processor", "devices.protocol", "devices.running", "devices.runtime", "devices.server",
    "devices.sessions", "devices.wire",
)  # fmt: skip
MAIN = """import sys

if sys.version_info < (3, 11):
    raise SystemExit(f"the agent needs Python 3.11 or newer, not {sys.version.split()[0]}")
from importlib.util import find_spec

if find_spec("numpy") is None or not (find_spec("onnxruntime") or find_spec("openvino")):
    raise SystemExit(
        "the agent needs numpy, and onnxruntime or openvino: python3 -m venv agent && agent/bin/pip install numpy 'onnxruntime>=1.23', "
        "then agent/bin/python agent.pyz"
    )
from autocompress.devices.agent import main

raise SystemExit(main())
"""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Of all entries, so that the same agent is the same file."""


def pack(path: Path) -> None:
    """Write the agent to `path`. Raises RunFolderError where that cannot be written."""
    home, packed = Path(__file__).parents[1], io.BytesIO()
    contents = {"__main__.py": MAIN} | {f"autocompress/{package}__init__.py": "" for package in ("", "devices/", "system/")}
    for module in MODULES:
        source = Path(*module.split(".")).with_suffix(".py")
        contents[str(Path("autocompress") / source)] = (home / source).read_text(encoding="utf-8")
    packed.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    write_atomically(path, packed.getvalue())
