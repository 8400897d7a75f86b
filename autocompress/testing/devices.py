"""A device without hardware: the cost of a file is arithmetic, noise and failures follow a script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from autocompress.devices import processor
from autocompress.devices.base import Device, DeviceProfile
from autocompress.devices.frames import Feed
from autocompress.devices.timing import summarise
from autocompress.errors import PolicyFailure
from autocompress.record import Record
from autocompress.records import Measurement
from autocompress.workload import Operator, Workload

ROUNDS, SAMPLES_A_ROUND = 12, 5
LAYERS = ("Conv", "Gemm", "MatMul")
FREE = frozenset({
    "QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "Identity", "Transpose", "Cast", "Constant", "Reshape", "Flatten", "Shape",
})  # fmt: skip
"""What a runtime folds into its neighbours, or does without touching data."""


class Costs(Record):
    """Seconds: of a call, of a node, of a multiply-accumulate in float32 and in int8, of an element that another node writes."""

    call: float = 20e-6
    node: float = 1e-6
    mac: float = 1e-10
    mac_int8: float = 0.4e-10
    element: float = 1e-9


class FakeDevice(Device):
    """Takes as long as `costs` says: call + sum over nodes of (node + multiply-accumulates or elements).

    Additive, so the truth of every file is known. For networks whose activations are ReLUs, `seconds_of` a workload is what the file
    of that workload's student takes.
    """

    def __init__(
        self,
        costs: Costs | None = None,
        *,
        noise: float = 0.0,
        failures: Mapping[int, Exception] | None = None,
        profile: DeviceProfile | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            noise: standard deviation of one sample relative to the truth; the samples follow from `seed` and the number of calls.
            failures: number of the call to `measure` (from 0) -> what it raises.
        """
        self.name = "fake"
        saturates = processor.int8_saturates(processor.flags())  # of this machine, since it runs the files
        self.profile = profile or DeviceProfile(runtime="fake", channel_multiple=1, reduced_range=saturates)
        self.costs = costs or Costs()
        self.noise = noise
        self.failures = dict(failures or {})
        self.calls = 0
        self._generator = np.random.default_rng(seed)

    def run(self, path: Path, batches: Iterable[Feed]) -> np.ndarray:
        """What ONNX Runtime answers, in this process: the fake is about time only."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return np.concatenate([session.run(None, dict(zip(names, arrays, strict=True)))[0] for arrays in batches])

    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        call, self.calls = self.calls, self.calls + 1
        if call in self.failures:
            raise self.failures[call]
        measurements = []
        for path in paths:
            try:
                truth = self.seconds_of_model(onnx.load(path))
            except Exception as error:  # protobuf and the file system each raise their own kinds
                raise PolicyFailure(f"the fake device cannot run {path.name}: {type(error).__name__}: {error}") from None
            samples = self._samples(truth, ROUNDS * SAMPLES_A_ROUND).reshape(ROUNDS, SAMPLES_A_ROUND)
            measurements.append(summarise(samples, first_call=truth, environment=self.environment()))
        return measurements

    def measure_many(self, models: Sequence[bytes], *, seconds_each: float = 0.02) -> list[float | None]:
        return [self._median(model) for model in models]

    def environment(self) -> dict[str, str]:
        return {"processor": "fake", "threads": str(self.profile.threads)}

    def seconds_of(self, workload: Workload) -> float:
        """The truth for a workload, without a file."""
        return self.costs.call + sum(map(self.seconds_of_operator, workload.operators))

    def seconds_of_operator(self, operator: Operator) -> float:
        """The truth for one operator in a network: without the cost of a call."""
        if operator.kind in ("conv", "linear"):
            return self._layer(operator.macs, is_int8=operator.bits == 8)
        return self.costs.node + self.costs.element * math.prod(operator.output)

    def seconds_of_model(self, model: onnx.ModelProto) -> float:
        """The truth for an ONNX model."""
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        shapes = {value.name: tuple(value.dims) for value in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            shapes[value.name] = tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
        quantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        return self.costs.call + sum(self._node(node, shapes, quantized) for node in graph.node if node.op_type not in FREE)

    def _node(self, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], quantized: set[str]) -> float:
        elements = math.prod(shapes[node.output[0]])
        if node.op_type not in LAYERS:
            return self.costs.node + self.costs.element * elements
        per_output = math.prod(shapes[node.input[1]][1:]) if node.op_type == "Conv" else shapes[node.input[0]][-1]
        return self._layer(elements * per_output, is_int8=node.input[0] in quantized)

    def _layer(self, macs: int, *, is_int8: bool) -> float:
        return self.costs.node + macs * (self.costs.mac_int8 if is_int8 else self.costs.mac)

    def _median(self, model: bytes) -> float | None:
        try:
            return float(np.median(self._samples(self.seconds_of_model(onnx.load_from_string(model)), SAMPLES_A_ROUND)))
        except Exception:  # as a runtime refuses a model, for any reason
            return None

    def _samples(self, truth: float, n: int) -> np.ndarray:
        return truth * np.maximum(1.0 + self.noise * self._generator.standard_normal(n), 0.1)
