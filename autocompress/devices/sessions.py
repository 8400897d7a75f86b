"""A file as a runtime has loaded it. Only for the process that runs files: it imports the runtimes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Feeds = Mapping[str, NDArray[Any]]
TYPES: dict[str, DTypeLike] = {
    "float": np.float32, "float16": np.float16, "double": np.float64, "int64": np.int64, "int32": np.int32,
    "uint8": np.uint8, "int8": np.int8, "bool": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """What a file takes; free dimensions are 1."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Session(Protocol):
    """A loaded file."""

    inputs: list[Input]

    def run(self, feeds: Feeds) -> NDArray[Any]:
        """The first output."""
        ...


class OnnxRuntimeSession:
    """In ONNX Runtime, from a file or from memory; it computes in the types of the file."""

    def __init__(self, model: str | bytes, threads: int, precision: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls: other files are measured in turns
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = [Input(value.name, _dtype(value.type), _fixed(value.shape)) for value in self._session.get_inputs()]

    def run(self, feeds: Feeds) -> NDArray[Any]:
        first: NDArray[Any] = self._session.run(None, feeds)[0]
        return first


class OpenVinoSession:
    """In OpenVINO's CPU plugin, from a file or from memory; by itself it would choose the precision by the processor."""

    def __init__(self, model: str | bytes, threads: int, precision: str) -> None:
        import openvino

        core = openvino.Core()
        network = core.read_model(model if isinstance(model, str) else io.BytesIO(model))
        shapes = {value.get_any_name(): _fixed([_size(size) for size in value.partial_shape]) for value in network.inputs}
        if any(value.partial_shape.is_dynamic for value in network.inputs):
            network.reshape(shapes)
        settings = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        self._request = core.compile_model(network, "CPU", settings).create_infer_request()
        self.inputs = [
            Input(name, np.dtype(value.element_type.to_dtype()), shapes[name])
            for value in network.inputs
            for name in [value.get_any_name()]
        ]

    def run(self, feeds: Feeds) -> NDArray[Any]:
        first: NDArray[Any] = self._request.infer(feeds, share_inputs=True)[0]
        return first


SESSIONS: dict[str, type[OnnxRuntimeSession] | type[OpenVinoSession]] = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}


def open_session(runtime: str, model: str | bytes, threads: int, precision: str) -> Session:
    """Load a model with a runtime of `runtime.TITLES`, in a precision that it takes. Raises what the runtime raises."""
    return SESSIONS[runtime](model, threads, precision)


def _dtype(name: str) -> np.dtype[Any]:
    """Of ONNX Runtime's `tensor(float)`."""
    return np.dtype(TYPES[name.removeprefix("tensor(").removesuffix(")")])


def _size(dimension: Any) -> int:
    """Of one of OpenVINO's dimensions; 0 where it is free."""
    return int(dimension.get_length()) if dimension.is_static else 0


def _fixed(shape: Any) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) and size > 0 else 1 for size in shape)
