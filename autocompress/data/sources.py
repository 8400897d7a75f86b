"""Where data comes from: references, and what a user's function returns or Python gives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.data.splits import IMAGENET_MEAN, IMAGENET_STD, Data, Split, as_split, stratified
from autocompress.errors import UsageError, one_line
from autocompress.references import DATA_ROOT, call_function, parse_reference
from autocompress.system.progress import PhaseTick

VAL_FRACTION = 0.1
TEST_FRACTION = 0.2
SMALL_VAL_FRACTION = 0.2
"""Of the few digits of the demonstration: a tenth could not tell one policy from the next."""

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Parts of an image folder that is divided already, and what their folders are called."""

MOST_NAMED = 5
OUT_OF_TRAIN = "validation and test examples are drawn from {}: a network that was trained on them scores too high. Better hold some out"

Splits = Sequence[Any]
"""Two or three of `Split` or (inputs, targets): train, validation, test."""


def load_data(reference: str, tick: PhaseTick | None = None) -> Data:
    """`digits`, `torchvision:CIFAR10?root=DIR`, `imagefolder:DIR?size=224` or `file.py:function`.

    tick: told of how many images are decoded.

    Raises UsageError for anything that does not load.
    """
    name, options = parse_reference(reference)
    if name == "digits":
        _known_options(options, set(), name)
        return _digits()
    if name.startswith("torchvision:"):
        return _torchvision(name.removeprefix("torchvision:"), options)
    if name.startswith("imagefolder:"):
        return _image_folder(Path(name.removeprefix("imagefolder:")), options, tick)
    if ":" in name:
        _known_options(options, set(), name)
        return as_data(call_function(name), f"what {name} returns")
    raise UsageError(
        f"unknown data {reference!r}",
        hint="use digits, torchvision:NAME?root=DIR, imagefolder:DIR or file.py:function",
    )


def _three_way(whole: Split, val_fraction: float = VAL_FRACTION) -> tuple[Split, Split, Split]:
    rest, test = stratified(whole.targets, TEST_FRACTION)
    train, val = stratified(whole.targets[rest], val_fraction / (1 - TEST_FRACTION))
    return whole[rest[train]], whole[rest[val]], whole[test]


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    train, val, test = _three_way(Split(images, torch.tensor(bunch.target, dtype=torch.long)), SMALL_VAL_FRACTION)
    return Data(train, val, test, classes=10, shift=1)


def _channel_values(options: dict[str, str], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    if key not in options:
        return default
    try:
        values = tuple(float(part) for part in options[key].split(","))
    except ValueError:
        raise UsageError(
            f"{key} must be numbers separated by commas, but got {options[key]!r}",
            hint=f"for example {key}={','.join(f'{value:g}' for value in default)}",
        ) from None
    if len(values) != len(default):
        raise UsageError(
            f"{key} must hold {len(default)} numbers, one a channel, but got {options[key]!r}",
            hint=f"for example {key}={','.join(f'{value:g}' for value in default)}",
        )
    return values


def _flag(options: dict[str, str], key: str, default: bool) -> bool:
    value = options.get(key, str(default)).lower()
    if value not in ("true", "false"):
        raise UsageError(f"{key} must be true or false, but got {options[key]!r}", hint=f"{key}=true or {key}=false")
    return value == "true"


def _normalised(
    splits: tuple[Split, Split, Split], class_names: Sequence[str], options: dict[str, str], *, flip: bool = True, note: str = ""
) -> Data:
    channels, height, _ = splits[0].input_shapes[0]
    mean = IMAGENET_MEAN if channels == 3 else (0.5,) * channels
    std = IMAGENET_STD if channels == 3 else (0.5,) * channels
    return Data(
        *splits,
        classes=len(class_names),
        class_names=tuple(os.fsencode(name).decode(errors="replace") for name in class_names),  # of folders, which may be called anything
        mean=_channel_values(options, "mean", mean),
        std=_channel_values(options, "std", std),
        flip=_flag(options, "flip", flip),
        shift=max(1, height // 8),
        note=note,
    )


def _known_options(options: dict[str, str], known: set[str], reference: str) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of the data {reference}", hint=f"it takes {', '.join(sorted(known)) or 'none'}")


WRITING = ("MNIST", "KMNIST")
"""Data sets of written characters, which mirroring turns into others; `?flip=true` mirrors them all the same."""


def _torchvision(name: str, options: dict[str, str]) -> Data:
    import torchvision.datasets

    _known_options(options, {"root", "mean", "std", "flip"}, f"torchvision:{name}")
    dataset = getattr(torchvision.datasets, name, None)
    supported = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST")
    if dataset is None or name not in supported:
        raise UsageError(f"unknown data set torchvision:{name}", hint=f"known: {', '.join(supported)}; others: file.py:function")
    root = Path(options.get("root", DATA_ROOT)).expanduser()
    try:
        train, test = dataset(str(root), train=True), dataset(str(root), train=False)
    except Exception as error:  # of files that are cut off torchvision's readers raise many kinds
        raise UsageError(
            f"{name} cannot be read from {str(root)!r}: {one_line(error)}", hint=f"name its folder: torchvision:{name}?root=DIR"
        ) from None
    whole = _array_split(train)
    splits = _fill_missing(whole, None, _array_split(test))
    return _normalised(splits, train.classes, options, flip=name not in WRITING)


def _array_split(dataset: Any) -> Split:
    images = torch.as_tensor(np.asarray(dataset.data))
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(np.asarray(dataset.targets), dtype=torch.long))


def _image_folder(folder: Path, options: dict[str, str], tick: PhaseTick | None) -> Data:
    from autocompress.data.images import decode_folder

    _known_options(options, {"size", "channels", "mean", "std", "flip"}, f"imagefolder:{folder}")
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UsageError(f"the image folder {str(folder)!r} does not exist", hint="give imagefolder:DIR, with one folder a class in it")
    text = options.get("size", "224")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"size must be a whole number of pixels, but got {text!r}", hint="imagefolder:DIR?size=224")
    if options.get("channels", "3") not in ("1", "3"):
        raise UsageError(
            f"channels must be 3 (colour) or 1 (grey), but got {options['channels']!r}",
            hint="imagefolder:DIR?channels=1 for a model of grey images",
        )
    size, channels = int(text), int(options.get("channels", "3"))
    parts = _parts(folder) or {"train": folder}
    train, classes = decode_folder(parts["train"], size, channels, tick)
    val, test = (_held_out(parts[name], size, channels, classes, tick) if name in parts else None for name in ("val", "test"))
    note = OUT_OF_TRAIN.format(parts["train"]) if val is test is None else ""
    return _normalised(_fill_missing(Split(*train), val, test), classes, options, note=note)


def _parts(folder: Path) -> dict[str, Path] | None:
    """The folders of train, val and test, as far as there are any; None where the images are not divided.

    Raises UsageError where one is missing and another folder may be meant for it: images that a model was trained on tell nothing.
    """
    folders = {place.name.lower(): place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")}
    names = {name: part for part, names in PARTS.items() for name in names}
    train = next((folders[name] for name in PARTS["train"] if name in folders), None)
    if train is None or not any(place.is_dir() for place in train.iterdir()):
        return None
    parts = {part: folders[first] for part, known in PARTS.items() if (first := next((name for name in known if name in folders), None))}
    unknown = [place.name for name, place in folders.items() if name not in names]
    if unknown and len(parts) < len(PARTS):
        missing = next(part for part in PARTS if part not in parts)
        raise UsageError(
            f"{str(folder)!r} holds train, but no {missing}, and {unknown[0]!r}, which is none of {', '.join(names)}",
            hint=f"name it {missing}, or move it elsewhere: what is missing is taken from the other one, or from train",
        )
    return parts


def _held_out(folder: Path, size: int, channels: int, classes: list[str], tick: PhaseTick | None) -> Split:
    from autocompress.data.images import decode_folder

    (images, labels), found = decode_folder(folder, size, channels, tick)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise UsageError(
            f"the class folders of {str(folder)!r} must be among those of train, but {_some(unknown)} is not",
            hint=f"give each part one folder a class, with the same names in all: train has {_some(classes)}",
        )
    return Split(images, torch.tensor([classes.index(name) for name in found])[labels])


def _some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(map(repr, names[:MOST_NAMED])) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _fill_missing(train: Split, val: Split | None, test: Split | None) -> tuple[Split, Split, Split]:
    """Three splits. One that is held out is halved: the model has probably seen all of train, which then tells nothing of what is lost."""
    if val is not None and test is not None:
        return train, val, test
    held_out = val if val is not None else test
    if held_out is not None:
        rest, half = stratified(held_out.targets, 0.5)
        if not len(half):  # of each class there is one example
            rest, half = torch.arange(len(held_out)).tensor_split(2)
        return train, held_out[half], held_out[rest]
    return _three_way(train)


def as_data(made: Any, reference: str) -> Data:
    """Data, or two or three splits, as a user's function returns them or Python gives them. Raises UsageError for anything else."""
    if isinstance(made, Data):
        return made
    if isinstance(made, (tuple, list)) and len(made) in (2, 3):
        splits = [as_split(part, reference).with_classes(reference) for part in made]
        train, val, test = splits if len(splits) == 3 else _fill_missing(splits[0], splits[1], None)
        return Data(train, val, test)
    raise UsageError(
        f"{reference} must be autocompress.Data or (train, val, test) of (inputs, targets), but is {type(made).__name__}",
        hint="make it autocompress.Data(train, val, test)",
    )
