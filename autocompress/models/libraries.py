"""Networks of torchvision, timm and transformers, with the weights that they publish where these are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from autocompress.errors import UsageError, one_line
from autocompress.references import nearest, parse_reference


class Library(Protocol):
    """Builds the network that a reference names.

    Args:
        classes: what the data tells apart; None where no data is known.
        own_weights: whether a file of weights replaces those that the library would load.

    Raises UsageError when there is no such network, or its weights cannot be had or are for other classes.
    """

    def __call__(self, reference: str, classes: int | None, *, own_weights: bool) -> nn.Module: ...


def _torchvision(reference: str, classes: int | None, *, own_weights: bool) -> nn.Module:
    from torchvision import models

    name, pretrained = _name_and_pretrained(reference, own_weights)
    if name not in models.list_models():
        raise UsageError(f"unknown model torchvision:{name}", hint=nearest(name, models.list_models()))
    if pretrained:
        with _loading_published(reference):
            model = models.get_model(name, weights="DEFAULT")
        known = models.get_model_weights(name).DEFAULT.meta.get("categories")
        _require_classes(reference, len(known) if known else None, classes)
        prepared = models.get_model_weights(name).DEFAULT.transforms()
        if hasattr(prepared, "mean") and hasattr(prepared, "std"):
            model.pretrained_cfg = {"mean": prepared.mean, "std": prepared.std}  # as timm has it
        return model
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # else the backbone's would be downloaded
    return models.get_model(name, weights=None, **options)


def _timm(reference: str, classes: int | None, *, own_weights: bool) -> nn.Module:
    name, pretrained = _name_and_pretrained(reference, own_weights)
    try:
        import timm
    except ImportError:
        raise _not_installed("timm") from None
    if not timm.is_model(name):
        raise UsageError(f"unknown model timm:{name}", hint=nearest(name, timm.list_models()))
    if pretrained:
        with _loading_published(reference):
            model = timm.create_model(name, pretrained=True)
        _require_classes(reference, getattr(model, "num_classes", None), classes)
        return model
    return timm.create_model(name, pretrained=False, **({} if classes is None else {"num_classes": classes}))


def _transformers(reference: str, classes: int | None, *, own_weights: bool) -> nn.Module:
    """A folder that `save_pretrained` has written, or a name of the hub: its architecture, and its weights unless a file has them.

    Code that a repository ships is never run (`trust_remote_code` stays off).
    """
    name, options = _options(reference, {"revision"}, example="transformers:ORGANISATION/MODEL?revision=COMMIT")
    try:
        import transformers
    except ImportError:
        raise _not_installed("transformers") from None
    where = _folder_or_name(name)
    with _silent(transformers), _loading_published(reference):
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    is_network = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_network:  # another one may ask to run a repository's code
        raise UsageError(
            f"{reference} is a network of no class of transformers (its config.json names {config.architectures})",
            hint="write a function that builds it: --model file.py:function",
        )
    tells_apart = kind.__name__.endswith("Classification")
    config.use_cache = False  # what was computed of earlier tokens is no output of a network that is called once
    with _silent(transformers):
        if own_weights:
            if tells_apart and classes is not None:
                config.num_labels = classes
            with _loading_published(reference):
                return kind(config)
        with _loading_published(reference):
            model, loaded = kind.from_pretrained(where, config=config, output_loading_info=True, **options)
    if lacking := sorted(loaded["missing_keys"]):
        raise UsageError(
            f"the weights of {reference} lack {lacking[0]!r}{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}",
            hint="train the model on your data first, and save it: model.save_pretrained(FOLDER)",
        )
    if tells_apart:
        _require_classes(reference, config.num_labels if config.num_labels > 1 else None, classes)
    model.pretrained_cfg = _image_statistics(transformers, where, options)
    return model


LIBRARIES: dict[str, Library] = {"torchvision:": _torchvision, "timm:": _timm, "transformers:": _transformers}
"""By what begins a reference; `references.MODEL_LIBRARIES` has the same."""


def _not_installed(library: str) -> UsageError:
    return UsageError(f"{library} is not installed", hint=f'pip install "autocompress[{library}]"')


def _options(reference: str, known: set[str], *, example: str) -> tuple[str, dict[str, str]]:
    """(name within its library, options). Raises UsageError for options that are unknown."""
    name, options = parse_reference(reference)
    if unknown := sorted(set(options) - known):
        raise UsageError(
            f"a model of a library takes the option {' or '.join(known)}, but got {unknown[0]!r} in {reference!r}",
            hint=f"for example {example}",
        )
    return name.partition(":")[2], options


def _name_and_pretrained(reference: str, own_weights: bool) -> tuple[str, bool]:
    """(name within its library, whether published weights are asked for)."""
    name, options = _options(reference, {"pretrained"}, example="torchvision:resnet18?pretrained=true")
    asked = options.get("pretrained", "false")
    if asked not in ("true", "false"):
        raise UsageError(
            f"a model of a library takes the option pretrained=true or =false, but got {reference!r}",
            hint="for example torchvision:resnet18?pretrained=true",
        )
    if asked == "true" and own_weights:
        raise UsageError(
            f"a model has either published weights or those of a file, but got {reference!r} and a file",
            hint="leave out pretrained=true or --weights",
        )
    return name, asked == "true"


def _folder_or_name(name: str) -> str:
    """Where transformers finds a model. Raises UsageError for what can only be a folder and is none."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise UsageError(
            f"the folder {str(folder)!r} does not exist",
            hint="give transformers:FOLDER as model.save_pretrained(FOLDER) has written it, or transformers:ORGANISATION/MODEL of the hub",
        )
    return name


@contextmanager
def _loading_published(reference: str) -> Iterator[None]:
    """Raises UsageError when what a library publishes cannot be had, or is damaged."""
    try:
        yield
    except Exception as error:  # whatever stands between this machine and a hub, or is wrong with a file
        raise UsageError(
            f"the published model {reference} cannot be loaded: {one_line(error)}",
            hint="without network download it elsewhere, and give the file as --weights, of transformers the folder as transformers:FOLDER",
        ) from error


def _require_classes(reference: str, known: int | None, classes: int | None) -> None:
    """Raises UsageError where the weights tell other classes apart than the data has."""
    if classes is not None and known is not None and known != classes:
        raise UsageError(
            f"the published weights of {reference} tell {known} classes apart, but the data has {classes}",
            hint="train the model on your data first, and give its weights as --weights",
        )


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without its progress bars and advice, which would be mixed with ours; what is wrong with weights is told as an error."""
    told = transformers.utils.logging
    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()


def _image_statistics(transformers: Any, where: str, options: dict[str, str]) -> dict[str, Any] | None:
    """How the images were normalised that the weights were trained on, by the names that timm has for it; None where that is not told."""
    try:
        told, _ = transformers.ImageProcessingMixin.get_image_processor_dict(where, **options)
    except (OSError, ValueError):
        return None
    if not told.get("do_normalize", True) or not {"image_mean", "image_std"} <= told.keys():
        return None
    return {"mean": tuple(told["image_mean"]), "std": tuple(told["image_std"])}
