"""OperatorTable: measured seconds of single operators on one device, and an interpolation between them.

The table is kept on disk for each device, processor and runtime version, and grows with every search.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autocompress.devices.base import Device
from autocompress.errors import PolicyFailure, RunFolderError
from autocompress.latency.synthetic import build_onnx, empty_model
from autocompress.system.cache import cache_folder
from autocompress.system.run_folder import write_atomically
from autocompress.workload import Operator, Shape, Signature, Workload

SCHEMA = 6
SECONDS_EACH = 0.02
NNLS_STEPS = 1000
"""scipy allows three a column, which columns that are nearly alike may take, and raises after them."""
CHUNK = 24
NEIGHBOURS = 3
LEAST_TO_LEARN = 4
VECTOR = 8
TINY_S, TINY_RATIO = 1e-7, 1e-3
CHECKED, MOST_CHANGE = 12, 0.08
"""Operators that are measured again before a table is believed; by how much they may differ, in the middle."""


class OperatorTable:
    """Seconds by operator signature. `lookup` gives what was measured, `estimate` also interpolates."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._measured: dict[Signature, float] = {}
        self._operators: dict[Signature, Operator] = {}
        self.call_overhead = 0.0
        self._models: dict[tuple[str, int], _Interpolation] | None = None
        self._estimates: dict[Signature, float] = {}
        if path is not None:
            self._load(path)

    @classmethod
    def for_device(cls, device: Device) -> OperatorTable:
        """The table of this device on this machine, as far as it was measured before."""
        facts = device.environment()
        key = [device.name, facts.get("processor", ""), facts.get("flags", ""), facts.get(device.profile.runtime, "")]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return cls(cache_folder() / "latency" / f"{name}.json")

    def __len__(self) -> int:
        return len(self._measured)

    def lookup(self, operator: Operator) -> float | None:
        """Measured seconds of this operator, or None."""
        return self._measured.get(operator.signature)

    def estimate(self, operator: Operator) -> float:
        """Measured seconds, or interpolated from measured operators of the same kind and bits."""
        key = operator.signature
        if key not in self._estimates:
            self._estimates[key] = self._measured[key] if key in self._measured else self._interpolate(operator)
        return self._estimates[key]

    def record(self, operator: Operator, seconds: float) -> None:
        """Add one measurement (call overhead taken off)."""
        key = operator.signature
        self._measured[key] = max(seconds, TINY_S)
        self._operators[key] = operator.model_copy(update={"name": ""})
        self._models, self._estimates = None, {}

    def measure(self, device: Device, workloads: Sequence[Workload], seconds: float, tick: Callable[[int, int], None] | None = None) -> int:
        """Measure operators of these workloads, the most useful first, for at most `seconds`; how many were tried.

        What is known is forgotten where some of it is no longer so: a machine of the same name may be another one, or was restless then.
        """
        if self._has_changed(device):
            self._forget()
        wanted = self._wanted(workloads)
        end, done = time.monotonic() + seconds, 0
        if wanted and not self.call_overhead:
            self.call_overhead = _each(device, [empty_model((1,))], seconds_each=5 * SECONDS_EACH)[0] or 0.0
        while done < len(wanted) and (time.monotonic() < end or not self._measured):
            chunk = [(operator, build_onnx(operator)) for operator in wanted[done : done + CHUNK]]
            built = [(operator, model) for operator, model in chunk if model is not None]
            for (operator, _), measured in zip(built, _each(device, [model for _, model in built]), strict=True):
                if measured is not None:
                    self.record(operator, measured - self.call_overhead)
            done += len(chunk)
            if tick is not None:
                tick(min(done, len(wanted)), len(wanted))
        self._save()
        return done

    def _has_changed(self, device: Device) -> bool:
        """Whether some of the known operators, of those that take longest, now take another time."""
        slowest = sorted(self._measured, key=lambda key: -self._measured[key])[: len(self._measured) // 2]
        checked = slowest[:: max(1, len(slowest) // CHECKED)][:CHECKED]
        models = {key: model for key in checked if (model := build_onnx(self._operators[key])) is not None}
        found = zip(models, _each(device, [*models.values()]), strict=True) if models else ()
        ratios = [(now - self.call_overhead) / self._measured[key] for key, now in found if now is not None]
        return bool(ratios) and float(np.median(np.abs(np.log(np.maximum(ratios, TINY_RATIO))))) > math.log1p(MOST_CHANGE)

    def _forget(self) -> None:
        self._measured, self._operators, self.call_overhead = {}, {}, 0.0
        self._models, self._estimates = None, {}

    def _wanted(self, workloads: Sequence[Workload]) -> list[Operator]:
        """Operators not measured yet: all of the first workload, then by how often they occur times what they cost by arithmetic."""
        weight: dict[Signature, float] = defaultdict(float)
        operators: dict[Signature, Operator] = {}
        for index, workload in enumerate(workloads):
            for operator in workload.operators:
                key = operator.signature
                operators.setdefault(key, operator)
                weight[key] += (1e12 if index == 0 else 0.0) + operator.macs + _elements(operator)
        missing = [key for key in operators if key not in self._measured and operators[key].kind != "other"]
        return [operators[key] for key in sorted(missing, key=lambda key: -weight[key])]

    def _interpolate(self, operator: Operator) -> float:
        if self._models is None:
            self._models = self._learn()
        model = self._models.get((operator.kind, operator.bits)) or self._models.get((operator.kind, 32)) or self._models.get(("", 0))
        return model.predict(operator) if model is not None else TINY_S

    def _learn(self) -> dict[tuple[str, int], _Interpolation]:
        by_kind: dict[tuple[str, int], list[Signature]] = defaultdict(list)
        for key, operator in self._operators.items():
            by_kind[operator.kind, operator.bits].append(key)
            by_kind["", 0].append(key)
        return {
            kind: _Interpolation([self._operators[k] for k in keys], np.array([self._measured[k] for k in keys]))
            for kind, keys in by_kind.items()
            if len(keys) >= LEAST_TO_LEARN or kind == ("", 0)
        }

    def _save(self) -> None:
        """A cache: where it cannot be written, the next search measures again."""
        if self._path is None:
            return
        entries = [{"operator": self._operators[k].model_dump(mode="json"), "seconds": s} for k, s in self._measured.items()]
        content = json.dumps({"schema": SCHEMA, "call_overhead_s": self.call_overhead, "entries": entries})
        with suppress(OSError, RunFolderError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, content)

    def _load(self, path: Path) -> None:
        """A cache that is not there, cannot be read, or is of another time, is measured again."""
        try:
            content = json.loads(path.read_text())
            if content["schema"] != SCHEMA:
                return
            self.call_overhead = float(content["call_overhead_s"])
            for entry in content["entries"]:
                self.record(Operator.model_validate(entry["operator"]), float(entry["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            self._forget()


def _each(device: Device, models: Sequence[bytes], seconds_each: float = SECONDS_EACH) -> list[float | None]:
    """Seconds of each model; None for those that bring the runtime down, which are found by halving."""
    try:
        return device.measure_many(models, seconds_each=seconds_each)
    except PolicyFailure:
        if len(models) == 1:
            return [None]
    half = len(models) // 2
    return [*_each(device, models[:half], seconds_each), *_each(device, models[half:], seconds_each)]


class _Interpolation:
    """Non-negative sum of physical costs, corrected by the nearest measured operators.

    Costs: one, multiply-accumulates with channels rounded up to the vector width, elements read, elements written, weights. Fitted in
    relative error. The ratio measured / fitted of the nearest neighbours (in logarithms of the costs) is the correction.
    """

    def __init__(self, operators: Sequence[Operator], seconds: NDArray[np.float64]) -> None:
        features = np.array([_features(operator) for operator in operators])
        self._coefficients, _ = nnls(features / seconds[:, None], np.ones(len(seconds)), maxiter=NNLS_STEPS)
        fitted = np.maximum(features @ self._coefficients, TINY_S)
        self._places = np.log1p(features)
        self._ratios = np.log(seconds / fitted)

    def predict(self, operator: Operator) -> float:
        features = np.array(_features(operator))
        distance = np.abs(self._places - np.log1p(features)).sum(1)
        nearest = np.argsort(distance)[:NEIGHBOURS]
        weight = 1.0 / (distance[nearest] + 0.05)
        correction = float(np.average(self._ratios[nearest], weights=weight))
        return float(max(features @ self._coefficients, TINY_S) * math.exp(correction))


def _features(operator: Operator) -> list[float]:
    macs = float(operator.macs or _products(operator))
    if operator.kind in ("conv", "linear") and operator.groups == 1:
        inputs = operator.inputs[0][1] if operator.kind == "conv" else operator.inputs[0][-1]
        outputs = operator.output[1] if operator.kind == "conv" else operator.output[-1]
        macs *= _round_up(inputs) / inputs * _round_up(outputs) / outputs
    read = float(sum(math.prod(shape) for shape in operator.inputs))
    return [1.0, macs, read, float(math.prod(operator.output)), float(operator.params)]


def _products(operator: Operator) -> int:
    """Multiply-accumulates of tensors with each other: none of them is a weight."""
    if operator.kind == "matmul":
        return math.prod(operator.output) * operator.inputs[0][-1]
    if operator.kind == "attention":  # of queries with keys, and of scores with values
        return 2 * math.prod(operator.output) * operator.inputs[min(1, len(operator.inputs) - 1)][-2]
    if operator.kind == "einsum" and operator.function is not None:
        terms = zip(operator.function.partition("->")[0].split(","), operator.inputs, strict=False)
        return math.prod({label: size for term, shape in terms for label, size in _labelled(term, shape)}.values())
    return 0


def _labelled(term: str, shape: Shape) -> Iterator[tuple[str, int]]:
    """Axes of an operand of an einsum by their labels; those that dots stand for are numbered from their end."""
    front, dots, back = term.partition("...")
    left, middle = len(front), len(shape) - len(front) - len(back)
    yield from zip(front, shape, strict=False)
    if dots:
        yield from ((str(middle - place), size) for place, size in enumerate(shape[left : left + middle]))
        yield from zip(back, shape[left + middle :], strict=False)


def _round_up(channels: int) -> int:
    return -(-channels // VECTOR) * VECTOR


def _elements(operator: Operator) -> float:
    return float(sum(math.prod(shape) for shape in operator.inputs) + math.prod(operator.output))
