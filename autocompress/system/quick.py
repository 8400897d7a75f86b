"""Torch's exporters without what they do anew each time: with small networks that is half of their time.

They look through their libraries of operators at every export, and make so many objects that the garbage collector runs all the while.
What is patched is torch's own and only so meanwhile; where a version has it no longer, exporting takes longer, and that is all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_turn = threading.RLock()
"""What two threads patched in turns would stay patched."""


@contextlib.contextmanager
def quick_trace() -> Iterator[None]:
    """For torch.export: operators are looked up once a process, and nothing is collected meanwhile."""
    with _turn:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with _patched(_looking_up_once):
                yield
        finally:
            if was_enabled:
                gc.enable()


@contextlib.contextmanager
def quick_export() -> Iterator[None]:
    """The same for torch.onnx.export, whose registry of operators is made once a process."""
    with quick_trace(), _patched(_registering_once):
        yield


@contextlib.contextmanager
def _patched(patch: Callable[[], tuple[Any, str, Any]]) -> Iterator[None]:
    """With an attribute of torch's replaced, where it is there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            owner, name, quick = patch()
        original = vars(owner)[name]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    setattr(owner, name, quick)
    try:
        yield
    finally:
        setattr(owner, name, original)


@functools.cache
def _looking_up_once() -> tuple[Any, str, Any]:
    from torch._export import utils

    return utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops)  # it gives nothing, and fills what is kept


@functools.cache
def _registering_once() -> tuple[Any, str, Any]:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = ONNXRegistry.from_torchlib

    @functools.cache
    def made(_: bool, *arguments: Any, **options: Any) -> Any:
        return make(*arguments, **options)

    def from_torchlib(*arguments: Any, **options: Any) -> Any:
        registry = copy.copy(made("torchvision" in sys.modules, *arguments, **options))  # whose operators have translations too
        for name, value in vars(registry).items():
            if isinstance(value, dict):  # of lists, to which an export may add
                setattr(registry, name, {key: copy.copy(known) for key, known in value.items()})
        return registry

    return ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)  # it is called on the class and on instances
