"""Data sets: splits, and deterministic augmentation.

Every split is arrays (in memory, or memory-mapped when decoded from image files): inputs n x ... and targets n x ....
uint8 images n x C x H x W are normalised when a batch is drawn. Augmentation is a pure function of (seed, epoch, index),
so that a teacher's answers for one epoch can be kept and used for every student (compress/teacher.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from autocompress.batch import Batch, Inputs, map_inputs, names_of, tensors_of
from autocompress.errors import UsageError
from autocompress.records import Normalisation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLIT_SEED = 20240
SPLITS = ("train", "val", "test")
FINITE_BYTES = 2**28
"""Of inputs that are looked at together for values that are not finite."""
FLOAT_BYTES = 4
IMAGE_AXES = 3
DIGEST_INPUTS = 8
MOST_LISTED = 5
"""Numbers, in a message."""
STACK = "several arrays are one for each input of the network: stack those that are one example each (numpy.stack)"
"""Hint where arrays may have been meant as single examples."""
CALIBRATION_BYTES = 2**30
"""Of the inputs that int8 ranges are fitted to, all together."""

Loss = Callable[[Tensor, Tensor], Tensor]
ScoreFunction = Callable[[Tensor, Tensor], float]


class Split:
    """Inputs and targets of one split: arrays with a row for each example.

    A part of a split (`split[index]`) is a view. Its rows are drawn when they are asked for, since the array may be a mapped file that is
    larger than memory.

    Args:
        inputs: an array; of networks with several inputs a tuple of arrays, or a dict of them by the names of the network's arguments.
        index: the row of `inputs` that belongs to each target; None: they are in the same order.
    """

    def __init__(self, inputs: Any, targets: Any, index: Tensor | None = None) -> None:
        self._inputs, self.targets = _inputs_of(inputs), _rows_of(targets, "targets")
        self._index = index
        self.is_known_finite = False
        """Whether its inputs were looked at: all of them may be larger than memory."""
        rows = len(self._inputs if index is None else index)
        if rows != len(self.targets):
            raise UsageError(
                f"a split must hold as many targets as inputs, but got {rows} inputs and {len(self.targets)} targets",
                hint=STACK if isinstance(self._inputs, Batch) and not self.input_names else "give one target for each row of the inputs",
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Tensor | slice) -> Split:
        if self._index is None and isinstance(index, slice):
            return Split(self._inputs[index], self.targets[index])
        rows = torch.arange(len(self)) if self._index is None else self._index
        return Split(self._inputs, self.targets[index], rows[index])

    @property
    def inputs(self) -> Inputs:
        """All inputs; copied where the split is a part of another one."""
        return self._inputs if self._index is None else self._inputs[self._index]

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each input of the network, without the batch."""
        return tuple(tuple(tensor.shape[1:]) for tensor in tensors_of(self._inputs))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each input of the network."""
        return tuple(tensor.dtype for tensor in tensors_of(self._inputs))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of the network's arguments that the inputs are for, where they are named."""
        return names_of(self._inputs)

    @property
    def form(self) -> str:
        """Shapes, types and names of the inputs, in words; floating point of any precision is one type, since models see float32."""
        kinds = ["floating point" if dtype.is_floating_point else str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        names = self.input_names or ("",) * len(kinds)
        forms = zip(names, self.input_shapes, kinds, strict=True)
        return " and ".join(f"{name} {shape} {kind}".lstrip() for name, shape, kind in forms)

    def rows(self, index: Tensor) -> Inputs:
        """The inputs at `index`, as they are stored."""
        return self._inputs[index if self._index is None else self._index[index]]

    def with_float32(self) -> Split:
        """The split with targets of floating point in float32, as outputs are: a loss of both could not be differentiated otherwise."""
        if not self.targets.is_floating_point() or self.targets.dtype == torch.float32:
            return self
        return Split(self._inputs, self.targets.float(), self._index)

    def with_classes(self, name: str) -> Split:
        """The split with targets in int64. Raises UsageError for targets that are not one class a row; `name` says whose they are."""
        targets, other = self.targets, "for other tasks give autocompress.Data its own loss and score"
        if targets.is_floating_point() or targets.is_complex():
            raise UsageError(
                f"targets must be whole numbers, the classes, but those of {name} are {targets.dtype}",
                hint=f"convert classes to int64; {other}",
            )
        if targets.dim() != 1:
            raise UsageError(
                f"targets must be one class a row, of shape ({len(self)},), but those of {name} have shape {tuple(targets.shape)}",
                hint=f"give targets[:, 0] of a single column, targets.argmax(1) of one-hot rows; {other}",
            )
        return self if targets.dtype == torch.int64 else Split(self._inputs, targets.long(), self._index)


def _inputs_of(values: Any) -> Inputs:
    """One tensor, or one for each input of the network. Raises UsageError unless all of them have as many rows."""
    if isinstance(values, Tensor | Batch):
        return values if isinstance(values, Batch) else _rows_of(values, "inputs")
    names: tuple[str, ...] = ()
    if isinstance(values, Mapping) and values:
        names, tensors = tuple(map(str, values)), tuple(_rows_of(array, f"inputs {name!r}") for name, array in values.items())
    elif isinstance(values, (tuple, list)) and any(isinstance(array, (Tensor, np.ndarray)) for array in values):
        tensors = tuple(_rows_of(array, f"inputs {number}") for number, array in enumerate(values))
    else:
        return _rows_of(values, "inputs")
    sizes = [len(tensor) for tensor in tensors]
    if len(set(sizes)) > 1:
        raise UsageError(
            f"several arrays as inputs must have a row for each example, but these have {', '.join(map(str, sizes[:MOST_LISTED]))} rows",
            hint=STACK,
        )
    return Batch(tensors, names)


def _rows_of(values: Any, what: str) -> Tensor:
    try:
        rows = _tensor_of(values)
    except Exception:  # whatever the user's own kind of array raises
        rows = torch.tensor(0)
    if rows.dim() == 0:
        raise UsageError(
            f"a split must hold arrays of numbers with a row for each example, but its {what} are {type(values).__name__}",
            hint="give tensors or numpy arrays, one row an example",
        )
    return rows


def _tensor_of(values: Any) -> Tensor:
    """On the CPU. A column of pandas, which torch would ask for its rows by their labels, is the array that it holds."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    is_foreign = hasattr(values, "__array__") and not isinstance(values, np.ndarray)
    array = np.array(values) if is_foreign else values  # a copy: what pandas shows of its own is read-only
    return torch.as_tensor(array.copy() if isinstance(array, np.ndarray) and min(array.strides, default=0) < 0 else array)


def as_split(part: Any, reference: str) -> Split:
    """A split, or (inputs, targets) as one. Raises UsageError for anything else; `reference` says whose part it is."""
    if isinstance(part, Split):
        return part
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise UsageError(
            f"each split of {reference} must be (inputs, targets) arrays, but got {type(part).__name__}",
            hint="return three pairs: (train_x, train_y), (val_x, val_y), (test_x, test_y)",
        )
    return Split(*part)


@dataclass(frozen=True)
class Data:
    """The splits of one task and how to read them.

    The search sees `train` and `val` only; `test` is scored once, for the front that is reported.

    Args:
        train, val, test: splits, or pairs (inputs, targets), as `Split` takes them.
        classes: number of classes; None: as many as the targets name, or none for tasks that bring their own `loss` and `score`.
        class_names: what the classes are called, in their order, where that is known: the manifest says it beside the file.
        mean, std: per-channel normalisation of uint8 images (scaled to [0, 1] first); None leaves inputs as they are.
        flip: whether a mirrored input is as good as the original.
        shift: largest shift in pixels of the augmentation (0: none).
        loss: loss(outputs, targets) -> scalar; None: cross-entropy.
        score: score(outputs, targets) -> float over a whole split; None: accuracy. Of classifiers it may come without a loss.
        score_name: what reports call the score; None: the function's own name.
        score_direction: whether larger scores are better, or smaller ones.
        note: what who begins a search should know of the splits.
    """

    train: Split
    val: Split
    test: Split
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = False
    shift: int = 0
    loss: Loss | None = None
    score: ScoreFunction | None = None
    score_name: str | None = None
    score_direction: Literal["maximize", "minimize"] = "maximize"
    note: str = ""

    def __post_init__(self) -> None:
        for name in SPLITS:
            object.__setattr__(self, name, as_split(getattr(self, name), "autocompress.Data"))
            if len(getattr(self, name)) == 0:
                raise UsageError(
                    f"the {name} split must hold at least one input, but is empty",
                    hint="give it examples that the other splits do not hold",
                )
        self._require_one_form()
        self._require_augmentation()
        self._require_normalisation()
        self._require_finite()
        if self.loss is not None and self.score is None:
            raise UsageError("data with its own `loss` must bring its own `score`", hint="give both, or no loss for classification")
        if self.loss is None:
            self._take_classes()
            self.require_labels()
        else:
            for name in SPLITS:
                object.__setattr__(self, name, getattr(self, name).with_float32())
        self._take_class_names()

    def _require_one_form(self) -> None:
        forms = {name: getattr(self, name).form for name in SPLITS}
        other = next((name for name in SPLITS if forms[name] != forms["train"]), None)
        if other is not None:
            raise UsageError(
                f"the splits must hold inputs of one shape and type, but train has {forms['train']} and {other} {forms[other]}",
                hint="prepare the inputs of all splits alike",
            )

    def _require_augmentation(self) -> None:
        """Raises UsageError unless the inputs can be mirrored, and are images that can be shifted so far.

        Targets are not moved along, so that maps are refused.
        """
        shape, *others = self.train.input_shapes
        if self.is_augmented and self.train.targets.dim() > 2:
            raise UsageError(
                f"inputs are mirrored or shifted without their targets, but these are maps of shape {tuple(self.train.targets.shape[1:])}",
                hint="leave `flip` and `shift` out",
            )
        if self.is_augmented and others:
            raise UsageError(
                f"only examples of one input can be mirrored or shifted, but these have {1 + len(others)}",
                hint="leave `flip` and `shift` out",
            )
        if self.shift and len(shape) != IMAGE_AXES:
            raise UsageError(
                f"only images of shape channels x height x width can be shifted, but the inputs have shape {shape}",
                hint="leave `shift` out",
            )
        if self.shift and not 0 < self.shift < min(shape[1:]):
            raise UsageError(
                f"`shift` must lie in 0..{min(shape[1:]) - 1} pixels, but got {self.shift}", hint="a tenth of the width is usual"
            )

    def _require_normalisation(self) -> None:
        """Raises UsageError unless `mean` and `std` say how uint8 images are normalised."""
        if (self.mean is None) != (self.std is None):
            raise UsageError("data must have both `mean` and `std`, or neither", hint="give both, one value a channel")
        if self.mean is None or self.std is None:
            return
        images = [shape for shape, dtype in zip(self.train.input_shapes, self.train.dtypes, strict=True) if dtype == torch.uint8]
        if not images:
            raise UsageError(
                f"`mean` and `std` normalise images in uint8, but the inputs are {self.train.form}",
                hint="give uint8 images, or normalise the inputs yourself and leave `mean` and `std` out",
            )
        for channels in {shape[0] if shape else 1 for shape in images}:
            for name, values in (("mean", self.mean), ("std", self.std)):
                if not isinstance(values, Sequence) or len(values) not in (1, channels):
                    raise UsageError(
                        f"`{name}` must have a value for each of the {channels} channels, but is {values}",
                        hint="give one value a channel, or one for all",
                    )
        if not all(0 <= value <= 1 for value in self.mean):
            raise UsageError(
                f"`mean` must lie in 0..1, since pixels are divided by 255 first, but is {tuple(self.mean)}",
                hint="divide mean and std by 255",
            )
        if not all(value > 0 for value in self.std):
            raise UsageError(
                f"`std` must be greater than zero, but is {tuple(self.std)}", hint="give the standard deviation of each channel"
            )

    def _require_finite(self) -> None:
        for name in ("train", "val"):  # nothing looks at the test split before the end
            split = getattr(self, name)
            if split.is_known_finite:
                continue
            step = self.at_most(len(split), FINITE_BYTES)  # the whole may be a mapped file that is larger than memory
            parts = (tensors_of(split[slice(start, start + step)].inputs) for start in range(0, len(split), step))
            floats = (tensor for part in parts for tensor in part if tensor.is_floating_point())
            if any(dtype.is_floating_point for dtype in split.dtypes) and not all(bool(torch.isfinite(tensor).all()) for tensor in floats):
                raise UsageError(
                    f"inputs must be finite, but some of {name} are NaN or infinite", hint="fill in or leave out such examples"
                )
            split.is_known_finite = True

    def _take_class_names(self) -> None:
        """Raises UsageError unless they are text, and one a class, where their number is known."""
        given = () if self.class_names is None else self.class_names
        are_texts = not isinstance(given, str) and all(isinstance(name, str) for name in given)
        if not are_texts or (len(given) and self.classes not in (None, len(given))):
            raise UsageError(
                f"`class_names` must be a text for each of the {self.classes} classes, but got {given!r}",
                hint='give one name a class, in their order: class_names=("cat", "dog")',
            )
        object.__setattr__(self, "class_names", tuple(map(str, given)))  # numpy's texts are other ones

    def _take_classes(self) -> None:
        """Targets in int64, and how many classes they name."""
        for name in SPLITS:
            object.__setattr__(self, name, getattr(self, name).with_classes(name))
        if self.classes is None:
            named = max(int(getattr(self, name).targets.max()) for name in SPLITS) + 1
            object.__setattr__(self, "classes", max(named, len(self.class_names)))

    def require_labels(self) -> None:
        """Raises UsageError unless all targets lie in 0..classes - 1; nothing is asked of those that are not one class a row."""
        if self.classes is None or not self.decides:
            return
        for name in SPLITS:
            lowest, highest = map(int, getattr(self, name).targets.aminmax())
            if lowest < 0 or highest >= self.classes:
                raise UsageError(
                    f"labels must lie in 0..{self.classes - 1}, but those of {name} reach from {lowest} to {highest}",
                    hint="number the classes from 0",
                )

    @property
    def decides(self) -> bool:
        """Whether outputs are decisions between classes: each example is of one. Several labels and maps of classes are none."""
        return self.classes is not None and self.train.targets.dim() == 1 and not self.train.targets.is_floating_point()

    @property
    def scored_by(self) -> str:
        """The name of the score."""
        if self.score_name is not None or self.score is None:
            return self.score_name or "accuracy"
        name = getattr(self.score, "__name__", "score")
        return name if name.isidentifier() else "score"  # a lambda has none

    @property
    def digest(self) -> str:
        """16 hex digits: equal where the targets, a few of the inputs and how they are prepared are. Of the test split only its size."""
        told = hashlib.sha256(repr((self.classes, self.mean, self.std, self.flip, self.shift, len(self.test))).encode())
        for split in (self.train, self.val):
            few = torch.arange(DIGEST_INPUTS) * (len(split) - 1) // (DIGEST_INPUTS - 1)
            told.update(",".join(split.input_names).encode())
            for part in (split.targets, *tensors_of(split.rows(few))):
                told.update(repr((part.dtype, part.shape)).encode() + part.contiguous().view(torch.uint8).numpy().tobytes())
        return told.hexdigest()[:16]

    def example(self, batch: int) -> Inputs:
        """One batch of training inputs as the model takes it."""
        return self.prepare(self.train.rows(torch.arange(batch) % len(self.train)))

    def prepare(self, inputs: Inputs) -> Inputs:
        """What the model sees: images normalised, floating point in float32; whole numbers but uint8 stay as they are.

        A copy, since a network may change its inputs in place.
        """
        return map_inputs(self._prepared, inputs)

    def _prepared(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.uint8:
            return inputs.to(torch.float32 if inputs.is_floating_point() else inputs.dtype, copy=True)
        x = inputs.float().div_(255)
        if self.mean is None or self.std is None:
            return x
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x.sub_(torch.tensor(self.mean).view(shape)).div_(torch.tensor(self.std).view(shape))

    @property
    def normalisation(self) -> Normalisation | None:
        """What `prepare` does to images of whole numbers; None where the inputs are none."""
        if torch.uint8 not in self.train.dtypes:
            return None
        return Normalisation(mean=self.mean, std=self.std) if self.mean is not None and self.std is not None else Normalisation()

    def batches(self, split: Split, size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """The split in order, without augmentation; the last batch may be smaller."""
        for start in range(0, len(split), size):
            part = split[slice(start, start + size)]
            yield self.prepare(part.inputs), part.targets

    @property
    def is_augmented(self) -> bool:
        """Whether epochs differ in how they show an input."""
        return self.flip or bool(self.shift)

    def view(self, indices: Tensor, epoch: int, seed: int = 0) -> Inputs:
        """Training inputs as the model sees them in this epoch: the same for every caller.

        Mirroring alternates between epochs (Jordan 2024, arXiv 2404.00498, section 3.6): whether image i is mirrored in
        epoch e is the parity of (hash(i) + e), so that two epochs show both.
        """
        return map_inputs(lambda rows: self._augmented(rows, indices, epoch, seed), self.train.rows(indices))

    def _augmented(self, x: Tensor, indices: Tensor, epoch: int, seed: int) -> Tensor:
        if self.flip:
            side = _coin(indices, seed).logical_xor(torch.tensor(epoch % 2 == 1))
            x = torch.where(side.view((-1,) + (1,) * (x.dim() - 1)), x.flip(-1), x)
        x = self._prepared(x)
        return shifted(x, _offsets(len(self.train), self.shift, epoch, seed)[indices]) if self.shift else x

    def calibration_batches(self, n: int, size: int) -> Iterator[Inputs]:
        """`n` training inputs without augmentation, the same for every caller, in batches of `size`; fewer where they are huge."""
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        index = torch.randperm(len(self.train), generator=generator)[: self.at_most(n, CALIBRATION_BYTES)]
        for part in index.split(size):
            yield self.prepare(self.train.rows(part))

    def at_most(self, n: int, limit: int) -> int:
        """`n`, or as many inputs as take `limit` bytes as the model sees them; at least one."""
        return max(1, min(n, limit // (FLOAT_BYTES * max(1, sum(map(math.prod, self.train.input_shapes))))))


def _coin(indices: Tensor, seed: int) -> Tensor:
    """A fixed fair coin for each index (multiplicative hashing, Knuth, TAOCP volume 3, section 6.4)."""
    return ((indices + 7919 * seed) * 2654435761 >> 15) % 2 == 1


def _offsets(n: int, reach: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randint(-reach, reach + 1, (n, 2), generator=generator)


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Each image (n x C x H x W) moved by its own (dy, dx); the border is filled by reflection."""
    height, width = images.shape[-2:]
    rows = _reflect(torch.arange(height) + offsets[:, :1], height)
    columns = _reflect(torch.arange(width) + offsets[:, 1:], width)
    n, channels = torch.arange(len(images)), torch.arange(images.shape[1])
    return images[n[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp_(0, size - 1)


def stratified(targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of (rest, part) where part holds `fraction` of every class, at least one, and leaves one; the same for every seed."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(targets), generator=generator)
    part = torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        members = order[targets[order] == label]
        part[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return (~part).nonzero().flatten(), part.nonzero().flatten()


def sample(split: Split, n: int) -> Split:
    """`n` examples of a split, or all where it has no more; always the same ones, and more of them for a larger `n`."""
    return split if n >= len(split) else split[sampled(len(split), n)]


def sampled(size: int, n: int) -> Tensor:
    """The rows that `sample` takes of so many."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:n].sort().values
