"""References to models and data: `name?option=value`, `package.module:function`, `path/to/file.py:function`.

Running a user's function is running the user's code; references are taken from the command line, a task file or Python. `--resume` and
`--from` take them from the task that a run folder keeps only where a search of this user has written it (`task.load_kept_task`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from autocompress.errors import UsageError, one_line

DEFAULT_DEVICE = "onnxruntime:cpu?threads=1"
AGENT, AGENT_PORT = "agent://", 7878
"""How the name of a device elsewhere begins, and where an agent listens unless told otherwise."""
AGENT_FILE_MB, AGENT_MEMORY_MB = 512, 4096
"""What an agent takes unless told otherwise: of one file, and of a process of the runtime."""
FORMATS = ("onnx", "openvino", "torch")
"""What an export can write."""
DATA_ROOT = "data"
"""Where `torchvision:NAME` data lies unless its `root` says otherwise."""
OBJECT = "python:"
"""Begins the name of what was given as an object of Python: nothing can load it."""
MODEL_LIBRARIES, DATA_READERS = ("torchvision:", "timm:", "transformers:"), ("torchvision:", "imagefolder:")
"""Begin references to models and to data that name no function."""
DEMO = "autocompress.demo:"
"""Begins references to the networks of the demonstration."""
OURS = re.compile(r"autocompress\.(demo|testing\.models):\w+")
"""Functions of this package that build networks."""
USERS_ERRORS = (Exception, SystemExit)
"""What a user's code may raise; a script of theirs may also exit."""


def parse_reference(reference: str) -> tuple[str, dict[str, str]]:
    """`"torchvision:CIFAR10?root=DIR"` -> `("torchvision:CIFAR10", {"root": "DIR"})`."""
    name, _, query = reference.partition("?")
    if not name:
        raise UsageError(
            f"a reference must start with a name, but got {reference!r}", hint="for example torchvision:resnet18 or file.py:function"
        )
    return name, dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))  # a plus is itself, as in paths


def names_function(reference: str, readers: tuple[str, ...] = ()) -> bool:
    """Whether it is `file.py:function` or `package.module:function` of the user's, and not for one of these readers."""
    return ":" in reference and OURS.fullmatch(reference) is None and not reference.startswith(readers)


def draws_itself(space: str) -> bool:
    """Whether a space is a function, and not a shipped one or a TOML file."""
    return names_function(space) and not space.endswith(".toml")


def name_of(given: object) -> str:
    """How a task file names what was given: a reference by itself, a function of Python by its name, another object by its class."""
    return given if isinstance(given, str) else f"{OBJECT}{getattr(given, '__name__', type(given).__name__)}"


def require_name(reference: str) -> None:
    """Raises UsageError for what was an object of Python, given where a reference is to be loaded."""
    if reference.startswith(OBJECT):
        raise UsageError(
            f"the search was started from Python, with the object {reference.removeprefix(OBJECT)}, which no name stands for",
            hint="go on from there, and give the same objects: autocompress.search(model, data, ..., out=RUN, resume=True)",
        )


def absolute_path(path: str) -> str:
    """The path from the root of the disk, so that it means the same in every folder."""
    return str(Path(path).expanduser().absolute())


def absolute_function(reference: str) -> str:
    """`net.py:build` -> `"/project/net.py:build"`; a reference without a file stays as it is."""
    where, _, name = reference.rpartition(":")
    return f"{absolute_path(where)}:{name}" if where.endswith(".py") else reference


def absolute_model(reference: str) -> str:
    """The same with a function's file, or a folder of transformers: `transformers:my-bert` -> `"transformers:/project/my-bert"`."""
    name, mark, query = reference.partition("?")
    library, _, where = name.partition(":")
    if library == "transformers" and where and Path(where).expanduser().is_dir():  # else it is the name of one on a hub
        return f"transformers:{absolute_path(where)}{mark}{query}"
    return absolute_function(reference)


def absolute_data(reference: str) -> str:
    """`imagefolder:photos?size=32` -> `"imagefolder:/project/photos?size=32"`; so with the root of torchvision's, and with a file."""
    name, mark, query = reference.partition("?")
    if name.startswith("imagefolder:"):
        return f"imagefolder:{absolute_path(name.removeprefix('imagefolder:'))}{mark}{query}"
    if not name.startswith("torchvision:"):
        return absolute_function(reference)
    root = absolute_path(parse_reference(reference)[1].get("root", DATA_ROOT)).replace("%", "%25").replace("&", "%26")
    return "&".join([f"{name}?root={root}", *(part for part in query.split("&") if part and not part.startswith("root="))])


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean x?"` for a mistyped name, or the first known names."""
    known = list(known)
    if not known:
        return "there is none to name"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def require_formats(formats: Sequence[str]) -> None:
    """Raises UsageError unless each is one of FORMATS."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        name = next(iter(unknown), "")
        raise UsageError(f"the formats of an export must be some of {', '.join(FORMATS)}, but got {name!r}", hint=nearest(name, FORMATS))


def call_function(reference: str) -> Any:
    """Import and call `package.module:function` or `file.py:function` without arguments.

    Raises UsageError when it is not there; the function's own exceptions become a UsageError that names them.
    """
    function = _find_function(reference)
    try:
        return function()
    except UsageError:
        raise
    except USERS_ERRORS as error:
        raise UsageError(f"{reference} raised {one_line(error)}", hint="run it alone to see the traceback") from error


def _find_function(reference: str) -> Callable[[], Any]:
    where, _, name = reference.rpartition(":")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{where} has no function {name!r}", hint=nearest(name, [n for n in vars(module) if not n.startswith("_")]))
    return function


def _import_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"the file {str(path)!r} does not exist", hint="give path/to/file.py:function")
    _importable(path.parent)
    name = f"autocompress_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by name
    try:
        spec.loader.exec_module(module)
    except USERS_ERRORS as error:
        del sys.modules[name]
        raise UsageError(f"{str(path)!r} does not import: {one_line(error)}", hint=f"python {path} must run without an error") from error
    return module


def _importable(folder: Path) -> None:
    """A script of the command line has no folder of yours on its path. At the end: nothing there may shadow a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_module(name: str) -> Any:
    try:
        if not name.startswith("autocompress."):
            _importable(Path.cwd())
        return importlib.import_module(name)
    except USERS_ERRORS as error:  # whatever the module's own code raises
        raise UsageError(f"the module {name!r} does not import: {one_line(error)}", hint="use file.py:function for a file") from error
