"""A network as a runtime sees it: its operators, with their shapes and their arithmetic."""

from __future__ import annotations

import math
from typing import Literal

from autocompress.record import Record

Shape = tuple[int, ...]
Signature = tuple[object, ...]
OperatorKind = Literal[
    "conv", "linear", "add", "mul", "maxpool", "avgpool", "norm", "activation", "concat", "pad", "slice", "matmul", "softmax",
    "attention", "layernorm", "groupnorm", "filter", "convtranspose", "recurrent", "einsum", "resize", "transpose", "move", "elementwise",
    "other",
]  # fmt: skip
"""Pools may be adaptive; `avgpool` covers means over the whole map, `norm` only norms that cannot be folded into a layer.

`filter` is a convolution or linear layer whose weight is one of its inputs, as it is for `convtranspose` and `recurrent`. `move` puts
values elsewhere; `elementwise` stands for every operator without a kind of its own. `other`, and operators that give several tensors
(recurrent ones apart), cost nothing.
"""


class Operator(Record):
    """One operator of a student as a runtime sees it: batch norm folded, fusible activation attached.

    Shapes include the batch; those of recurrent layers are steps x batch x channels. `function` is what the operator computes, where
    several share a kind; of an einsum its equation. `bits` is 8 when it runs in int8, else 32; `weight_bits` is what its weights take in
    the file. `params` counts weights and biases after folding, but none that are inputs.
    """

    name: str
    kind: OperatorKind
    inputs: tuple[Shape, ...]
    output: Shape
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    activation: str | None = None
    function: str | None = None
    bits: Literal[8, 32] = 32
    weight_bits: int = 32
    params: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates with weights; 0 for operators without."""
        if self.kind == "conv":
            return math.prod(self.output) * self.inputs[0][1] // self.groups * math.prod(self.kernel)
        if self.kind == "linear":
            return math.prod(self.output) * self.inputs[0][-1]
        if self.kind == "filter":
            return math.prod(self.output) * math.prod(self.inputs[1][1:])
        if self.kind == "convtranspose":
            return math.prod(self.inputs[0]) * math.prod(self.inputs[1][1:])
        if self.kind == "recurrent":
            return math.prod(self.output[:2]) * sum(math.prod(shape) for shape in self.inputs[1:] if len(shape) == 2)
        return 0

    @property
    def is_int8(self) -> bool:
        return self.bits == 8

    @property
    def read(self) -> int:
        """Elements of its first input."""
        return math.prod(self.inputs[0]) if self.inputs else 0

    @property
    def signature(self) -> Signature:
        """Everything but the name: operators with the same signature take the same time."""
        return tuple(value for field, value in self if field != "name")


class OutlineStep(Record):
    """One operator of a network as a person reads it, with what a runtime folds into it.

    name: of its layer, or of the operator. inputs: positions of the steps that it reads. group: the channel group that most of its channels
    are of. block: the innermost droppable block around it. line: of the code, where it is known. latency_s: of the operator by itself,
    where it was measured.
    """

    name: str
    title: str
    shape: Shape
    inputs: tuple[int, ...]
    group: str | None
    block: str | None
    params: int
    macs: int
    line: str
    latency_s: float | None = None


class Workload(Record):
    """The operators of one student in execution order, and the bytes of its weights in the file."""

    operators: tuple[Operator, ...]
    weight_bytes: int

    @property
    def converted(self) -> tuple[int, ...]:
        """For each operator the elements that it reads in another arithmetic than the operator before it has made: int8 or not."""
        before = (None, *self.operators)
        return tuple(
            operator.read if last is not None and last.is_int8 != operator.is_int8 else 0
            for last, operator in zip(before, self.operators, strict=False)
        )

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)

    @property
    def params(self) -> int:
        return sum(operator.params for operator in self.operators)
