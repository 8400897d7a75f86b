"""Load the user's model by its reference: that of a library, `package.module:function`, or `file.py:function`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from autocompress.errors import UsageError
from autocompress.models.calls import in_float32
from autocompress.models.libraries import LIBRARIES
from autocompress.models.weights import load_weights
from autocompress.references import call_function, parse_reference


def load_model(reference: str, *, weights: Path | None = None, classes: int | None = None) -> nn.Module:
    """The model in eval mode on the CPU, in float32, with `weights` loaded.

    Args:
        reference: `torchvision:NAME`, `timm:NAME` (both with `?pretrained=true` for the weights that the library publishes, downloaded
            once), `transformers:FOLDER` or `transformers:NAME` of a hub, `package.module:function` or `file.py:function`.
        weights: safetensors, or a state dict saved by torch.save (read with weights_only=True).
        classes: what the data tells apart: number of outputs asked of the libraries' models; None leaves their default.

    Raises UsageError when the model or the weights do not load.
    """
    name, options = parse_reference(reference)
    library = next((library for prefix, library in LIBRARIES.items() if name.startswith(prefix)), None)
    if library is not None:
        model = library(reference, classes, own_weights=weights is not None)
    elif ":" in name and options:
        raise UsageError(
            f"a function that builds a model takes no options, but got {reference!r}",
            hint="write another function of that file, which builds what you want",
        )
    elif ":" in name:
        model = call_function(name)
    else:
        raise UsageError(
            f"unknown model {reference!r}",
            hint="use torchvision:NAME, timm:NAME, transformers:FOLDER, package.module:function or file.py:function",
        )
    if not isinstance(model, nn.Module):
        raise UsageError(f"{reference} must return a torch.nn.Module, but got {type(model).__name__}", hint="return the model itself")
    model = in_float32(model)
    if weights is not None:
        load_weights(model, weights)
    return model.cpu().eval()
