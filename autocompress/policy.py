"""Policy: the complete, frozen recipe of one compressed network.

Together with the teacher a policy is enough to build the student's structure; with `student.safetensors` it is the student. Order of
application (compress/): student shape (dropped blocks, widths) -> channel removal -> low rank -> reconstruction -> distillation in float ->
quantization -> distillation through it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from autocompress.record import Record
from autocompress.units import counted

Criterion = Literal["l2", "l1", "median", "scale"]
KERNEL_BITS = (8, 32)
STORAGE_BITS = (2, 3, 4, 5, 6, 7, 16)


def _sorted_mapping(value: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(value.items()))


def rank_of(inputs: int, outputs: int, kept: float, multiple: int) -> int:
    """Rank at which a filter bank of `outputs` filters of `inputs` numbers keeps this share of its multiplications, in multiples.

    0 where that saves none: the layer stays whole.
    """
    even = inputs * outputs / (inputs + outputs)
    rank = max(multiple, round(kept * even / multiple) * multiple)
    return rank if kept < 1.0 and rank < even else 0


def bits_name(bits: int) -> str:
    """What a number of bits means to a person: only int8 and float32 have kernels."""
    return {8: "int8", 32: "float32"}.get(bits, f"{bits}-bit storage")


Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[float, Field(gt=0.0, le=8.0)]
Kept = Annotated[float, Field(gt=0.0, le=1.0)]
Bits = Annotated[int, Field(ge=2, le=32)]
AnswerLoss = Literal["kl", "decoupled", "relational"]
FeatureLoss = Literal["values", "similarity", "distances"]


class StudentSpec(Record):
    """The student's shape, relative to the network that it is derived from.

    reference: another architecture (a model REF) to derive the student from; None: the teacher.
    width: multiplies every channel group that may change. 1.0 keeps it; above 1.0 adds channels.
    widths: channel group -> a further multiplier for this group only.
    drop: residual blocks that are removed, by name.
    multiple: channel counts that change are rounded to it, since kernels work in vectors.
    """

    reference: str | None = None
    width: Width = 1.0
    widths: dict[str, Width] = {}
    drop: tuple[str, ...] = ()
    multiple: Annotated[int, Field(ge=1)] = 1

    _sort_widths = field_validator("widths")(_sorted_mapping)

    @field_validator("drop")
    @classmethod
    def _sort_drop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))


class PruneSpec(Record):
    """Channel removal: channel group -> fraction of its channels that is removed, in [0, 1).

    criterion: which ones stay, also where the student is narrower (graph/importance.py). Of filters, with the batch norm behind them folded
    in, those with the largest `l2` or `l1` norm (Li et al. 2017, arXiv 1608.08710), or the largest distance to all others of their layer
    (`median`: He et al. 2019, arXiv 1811.00250); or those whose batch norm multiplies by most (`scale`: Liu et al. 2017, arXiv 1708.06519).
    """

    ratios: dict[str, Ratio] = {}
    criterion: Criterion = "l2"

    _sort = field_validator("ratios")(_sorted_mapping)


class LowRankSpec(Record):
    """Factorisation of layers: layer -> share of its multiplications that is kept, in (0, 1]; 1 keeps the layer as it is.

    Two layers stand for one whose weights have a low rank: the first computes `rank` combinations of its inputs, the second makes the
    outputs of these (Zhang et al. 2016, arXiv 1505.06798). For a filter of k inputs and n outputs that is rank * (k + n) multiplications
    in place of k * n, whatever the policy has made of k and n.
    """

    kept: dict[str, Kept] = {}

    _sort = field_validator("kept")(_sorted_mapping)


class QuantSpec(Record):
    """Number of bits per layer.

    bits: what every convolution and linear layer gets; layers: exceptions by layer name.
    8 means int8 weights (per output channel, symmetric) and uint8 activations (per tensor, affine), executed in
    int8; 32 is float32; any other number is *storage*: weights are rounded and packed in the file and computed in float32.
    reduced_range: weights use 7 of the 8 bits, for processors whose int8 multiply-add saturates (x86 without VNNI).
    """

    bits: Bits = 32
    layers: dict[str, Bits] = {}
    reduced_range: bool = False

    _sort = field_validator("layers")(_sorted_mapping)

    @field_validator("bits", "layers")
    @classmethod
    def _known(cls, value: int | dict[str, int]) -> int | dict[str, int]:
        for bits in value.values() if isinstance(value, dict) else (value,):
            if bits not in KERNEL_BITS + STORAGE_BITS:
                raise ValueError(f"bits must be one of {sorted(KERNEL_BITS + STORAGE_BITS)}, but got {bits}")
        return value

    @property
    def rounds(self) -> bool:
        """Whether any layer gets fewer than 32 bits."""
        return self.bits < 32 or any(bits < 32 for bits in self.layers.values())

    def of(self, layer: str) -> int:
        """Bits of one layer; `LAYER.0` and `LAYER.1`, into which one may be factorised, have the layer's."""
        return self.layers.get(layer, self.layers.get(layer.rpartition(".")[0], self.bits))


class DistillSpec(Record):
    """Distillation of answers (Hinton et al. 2015, arXiv 1503.02531), of the features that they are read from, and of those inside.

    soft = how unlike the teacher's answers are, by one of ANSWER_LOSSES (compress/distill.py) at temperature T.
    loss = (1 - features) * (alpha * soft + (1 - alpha) * cross_entropy(student, labels)) + features * (scaled difference of features:
    compress/loss.py), batch means; where student or teacher has no classifier, without the latter.
    The difference of features is (1 - hidden) * (`feature_loss` of the inputs of the classifiers) + hidden * (mean difference of values
    where the residual blocks begin), the former alone where student and teacher have no layers inside in common.
    standardized: logits have mean 0 and deviation 1 before they are compared (Sun et al. 2024, arXiv 2403.01427).
    feature_loss: `values` compares channels that student and teacher share (SimKD: Chen et al. 2022, arXiv 2203.14001); the others compare
    how the inputs of a batch lie to each other, which needs none in common. Where there are none, `values` stands for `similarity`.
    """

    answers: AnswerLoss = "kl"
    standardized: bool = False
    feature_loss: FeatureLoss = "values"

    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 4.0
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    features: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    hidden: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class Policy(Record):
    """The complete recipe of one compressed network; the default policy changes nothing."""

    cure: ClassVar[str] = "mend this field; a valid policy.json stands beside every model"

    schema_version: Literal[1] = Field(1, alias="schema")
    student: StudentSpec = StudentSpec()
    prune: PruneSpec = PruneSpec()
    low_rank: LowRankSpec = LowRankSpec()
    quant: QuantSpec = QuantSpec()
    distill: DistillSpec = DistillSpec()

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def channels(self, group: str, size: int, unit: int = 1) -> int:
        """Channels that `group` of `size` channels has in the student, rounded to `student.multiple`, at least one multiple.

        Where each stands for `unit` channels of a layer, as an attention head does, it is their number that is rounded.

        An untouched group keeps its size, whatever the multiple; rounding makes no narrower group wider than it was, and no wider one
        narrower.
        """
        factor = self.student.width * self.student.widths.get(group, 1.0) * (1.0 - self.prune.ratios.get(group, 0.0))
        if factor == 1.0:
            return size
        multiple = min(self.student.multiple // math.gcd(self.student.multiple, unit), size)
        rounded = max(multiple, round(size * factor / multiple) * multiple)
        return min(rounded, size) if factor < 1.0 else max(rounded, size)

    @property
    def factorised(self) -> dict[str, float]:
        """Layers of a lower rank, with the share of their multiplications that is kept."""
        return {layer: kept for layer, kept in self.low_rank.kept.items() if kept < 1.0}

    def in_words(self, *, distilled: bool = True) -> str:
        """One line for a person: what changed against the teacher, and how that is `distilled` where it is."""
        parts = []
        if self.student.reference:
            parts.append(f"student {self.student.reference}")
        if self.student.drop:
            parts.append(f"{counted(len(self.student.drop), 'block')} dropped")
        widths = list(self.student.widths.values()) or [1.0]
        if self.student.width != 1.0 or set(widths) != {1.0}:
            low, high = self.student.width * min(widths), self.student.width * max(widths)
            parts.append(f"width {low:.2f}" if low == high else f"width {low:.2f}-{high:.2f}")
        ratios = [ratio for ratio in self.prune.ratios.values() if ratio]
        by = f" by {self.prune.criterion}" if self.prune.criterion != "l2" else ""
        if ratios:
            parts.append(f"{counted(len(ratios), 'group')} pruned by {100 * sum(ratios) / len(ratios):.0f} % on average{by}")
        elif by and self.student.width * min(widths) < 1.0:
            parts.append(f"channels chosen{by}")
        kept = list(self.factorised.values())
        if kept:
            parts.append(f"{counted(len(kept), 'layer')} of low rank with {100 * sum(kept) / len(kept):.0f} % of their multiplications")
        others = Counter(bits for bits in self.quant.layers.values() if bits != self.quant.bits)
        exceptions = ", ".join(f"{counted(count, 'layer')} {bits_name(bits)}" for bits, count in sorted(others.items()))
        parts.append(bits_name(self.quant.bits) + (f" ({exceptions})" if exceptions else ""))
        if not distilled:
            return "; ".join(parts)
        distill = self.distill
        kind = ("" if distill.answers == "kl" else f"{distill.answers} ") + ("standardized " if distill.standardized else "")
        by = "" if distill.feature_loss == "values" or not distill.features else f" by {distill.feature_loss}"
        inside = "" if distill.hidden == DistillSpec().hidden or not distill.features else f", hidden={distill.hidden:.2g}"
        parts.append(f"{kind}T={distill.temperature:.2g}, alpha={distill.alpha:.2g}, features={distill.features:.2g}{by}{inside}")
        return "; ".join(parts)
