"""What a student learns from its teacher: answers (logits), the features that they are read from, and what layers inside read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.batch import Inputs, call_network
from autocompress.policy import AnswerLoss, DistillSpec, FeatureLoss

TINY = 1e-8
OTHER_CLASSES = 8.0
"""Weight of what the other classes tell in the decoupled divergence."""
RELATIONS = 2.0
"""Weight of either kind of correlation."""
LEAST_APART = 1e-3
"""Of the mean distance between inputs: of nearer ones the direction is noise, whose gradient would be huge."""
ANGLES = 2.0
"""Weight of angles beside distances."""


Selected = Mapping[int, Tensor]
"""By axis the indices of entries; all of the axes that are not named."""


def selected(values: Tensor, where: Selected) -> Tensor:
    """These entries of the values."""
    for axis, index in where.items():
        values = values.index_select(axis, index.to(values.device))
    return values


@dataclass(frozen=True)
class Answers:
    """What a network says of n inputs: its outputs, and where they were observed the features (n x channels) they are read from.

    hidden: by layer what layers inside read, of some of the first inputs.
    """

    outputs: Tensor
    features: Tensor | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """What a layer of the student reads, beside what its counterpart in the teacher does.

    Args:
        layer, counterpart: their names.
        axis: of the channels.
        shared: by axis the index of each entry that both have, in the student's values and in the teacher's; of axes that are not named
            they have the same entries in the same order.
    """

    layer: str
    counterpart: str
    axis: int = 1
    shared: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def own(self) -> Selected:
        """Where the student has what both have."""
        return {axis: first for axis, (first, _) in self.shared.items()}

    @property
    def wanted(self) -> Selected:
        """Where the teacher has it."""
        return {axis: second for axis, (_, second) in self.shared.items()}

    def of(self, own: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The two values, of the entries that both have."""
        return selected(own, self.own), selected(wanted, self.wanted)


@dataclass(frozen=True)
class ComparedFeatures:
    """What is compared of what the layers of student and teacher read.

    Args:
        classifier: name of the linear layer that makes the student's outputs; None where there is none.
        features: its inputs beside those of the teacher's; None: of no channel is known that both have it.
        hidden: layers inside.
    """

    classifier: str | None = None
    features: Compared | None = None
    hidden: tuple[Compared, ...] = ()


def observe(model: nn.Module, inputs: Inputs, classifier: str | None, hidden: Sequence[str] = (), rows: int | None = None) -> Answers:
    """Outputs of the model, together with what its classifier and these layers were given, where they were called.

    rows: of what the layers inside were given only the first rows, copied: the model may overwrite it, and all of it is much.
    """
    seen: dict[str, Tensor] = {}

    def note(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            given = arguments[0] if arguments else named["input"]
            seen[layer] = given if rows is None or layer == classifier else given[:rows].clone()

        return hook

    layers = dict.fromkeys([*hidden, *([classifier] if classifier is not None else [])])
    handles = [model.get_submodule(layer).register_forward_pre_hook(note(layer), with_kwargs=True) for layer in layers]
    try:
        outputs = call_network(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    features = seen[classifier] if classifier is not None else None
    return Answers(outputs, features, {layer: seen[layer] for layer in hidden if layer in seen})


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher_T || student_T), mean over the batch (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        student_logits, teacher_logits: n x classes. The gradient reaches the student only.
        temperature: T > 0; both sides are softmax(logits / T). T^2 keeps the gradient's size independent of T.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def decoupled_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T^2 * (TCKD + 8 * NCKD), batch means: how sure both are of the label, and apart from that how they see the other classes.

    The divergence is TCKD + (1 - p) NCKD with the teacher's p of the label, so that a teacher who is sure of it says hardly anything of the
    others (Zhao et al. 2022, arXiv 2203.08679, equations 5 to 7; 8 is what they use for CIFAR).
    """
    label = F.one_hot(targets, student_logits.shape[1]).bool()
    parts = [_label_and_others(logits / temperature, label) for logits in (student_logits, teacher_logits.detach())]
    (own, own_others), (wanted, wanted_others) = parts
    target_class = F.kl_div(own, wanted, reduction="batchmean", log_target=True)
    other_classes = F.kl_div(own_others, wanted_others, reduction="batchmean", log_target=True)
    return (target_class + OTHER_CLASSES * other_classes) * temperature**2


def _label_and_others(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of (n x 2: the shares of the label and of all others, n x classes - 1: the shares of the others among themselves)."""
    others = logits[~label].view(len(logits), -1)
    both = torch.stack([logits[label], others.logsumexp(1)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(others, dim=1)


def relational_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * 2 * (2 - mean correlation over classes - mean correlation over inputs) of the answers of student and teacher.

    What is liked more than what counts, not how much; a student that is much weaker than its teacher can follow that further (DIST: Huang
    et al. 2022, arXiv 2205.10536, equations 6 to 9, with their weights of 2).
    """
    own, wanted = ((logits / temperature).softmax(1) for logits in (student_logits, teacher_logits.detach()))
    unlike = 2 - _correlation(own, wanted).mean() - _correlation(own.T, wanted.T).mean()
    return RELATIONS * unlike * temperature**2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each row with its namesake."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def standardized(logits: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the classes, input by input."""
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0).clamp_min(TINY)


ANSWER_LOSSES: dict[AnswerLoss, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kl": lambda student, teacher, _, temperature: soft_loss(student, teacher, temperature),
    "decoupled": decoupled_loss,
    "relational": lambda student, teacher, _, temperature: relational_loss(student, teacher, temperature),
}


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, spec: DistillSpec) -> Tensor:
    """alpha * (the policy's loss of answers) + (1 - alpha) * cross_entropy(student, targets)."""
    hard = F.cross_entropy(student_logits, targets)
    unlike = spec.standardized and student_logits.shape[1] > 2  # of two classes all would be alike
    own, wanted = (standardized(logits) if unlike else logits for logits in (student_logits, teacher_logits))
    return spec.alpha * ANSWER_LOSSES[spec.answers](own, wanted, targets, spec.temperature) + (1 - spec.alpha) * hard


def value_loss(own: Tensor, wanted: Tensor, axis: int = 1) -> Tensor:
    """Mean squared difference of features n x channels or maps with channels along `axis`, in units of the teacher's variance.

    The variance is that of a channel over batch and positions, on average of all channels. A student whose features are the teacher's has
    its answers, since the classifier is inherited (SimKD: Chen et al. 2022, arXiv 2203.14001, equation 3, where a projector stands in for
    channels that correspond).
    """
    return F.mse_loss(own, wanted) / channel_variance(wanted, axis)


def channel_variance(values: Tensor, axis: int = 1) -> Tensor:
    """The variance of a channel over batch and positions, on average of all channels; where a channel has one value, its square. Never 0.

    Two passes: several times as fast as torch's own over several axes.
    """
    others = [other for other in range(values.dim()) if other != axis % values.dim()]
    n = values.numel() // values.shape[axis]
    if n == 1:
        return values.float().square().mean() + TINY
    wide = torch.promote_types(values.dtype, torch.float32)
    apart = values - values.mean(others, keepdim=True, dtype=wide)
    return apart.square().mean() * (n / (n - 1)) + TINY


def similarity_loss(own: Tensor, wanted: Tensor) -> Tensor:
    """How unlike the similarities of each input to all others are: squared distance of the rows of both Gram matrices, of length 1 each.

    Features n x channels, of any numbers of channels (similarity-preserving distillation: Tung & Mori 2019, arXiv 1907.09682, equations 2
    to 4; a mean over the inputs here, so that it does not depend on the size of the batch).
    """
    grams = [F.normalize(features @ features.mT, dim=1) for features in (own, wanted)]
    return (grams[0] - grams[1]).square().sum(1).mean()


def distance_loss(own: Tensor, wanted: Tensor) -> Tensor:
    """How unlike the distances between inputs, in units of their mean, and the angles between three of them are (Huber's loss of either).

    Features n x channels, of any numbers of channels (relational distillation: Park et al. 2019, arXiv 1904.05068, equations 4 to 9, where
    angles count twice as much as distances).
    """
    if len(own) < 2:
        return 0.0 * own.sum()
    return F.smooth_l1_loss(_distances(own), _distances(wanted)) + ANGLES * F.smooth_l1_loss(_angles(own), _angles(wanted))


def _distances(features: Tensor) -> Tensor:
    """n x n."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(features)
    return distances / (distances.sum() / (n * (n - 1))).clamp_min(TINY)


def _angles(features: Tensor) -> Tensor:
    """n x n x n cosines, of the angle at the first between the second and the third; of inputs that are nearly the same they are small."""
    apart = features[None] - features[:, None]
    length = apart.norm(dim=2, keepdim=True)
    directions = apart / length.clamp_min(LEAST_APART * float(length.detach().mean()) + TINY)
    return directions @ directions.mT


FEATURE_LOSSES: dict[FeatureLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "values": value_loss,
    "similarity": similarity_loss,
    "distances": distance_loss,
}


def compare_features(student: Answers, teacher: Answers, compared: ComparedFeatures, kind: FeatureLoss) -> Tensor | None:
    """The loss of this kind, of what the classifiers read; None where there are none.

    `values` are compared of channels that both have, and where there are none by their similarities.
    """
    if student.features is None or teacher.features is None:
        return None
    own = student.features.float()
    wanted = teacher.features.detach().to(own)
    if kind != "values" or compared.features is None:
        return FEATURE_LOSSES["similarity" if kind == "values" else kind](own, wanted)
    return value_loss(*compared.features.of(own, wanted))


def difference(features: Tensor | None, hidden: Tensor | None, share: float) -> Tensor | None:
    """(1 - share) * features + share * hidden, or the one that there is."""
    if features is None or hidden is None:
        return features if hidden is None else hidden
    return (1 - share) * features + share * hidden
