"""A copy of a user's network whose layers hold their weights as they are, whatever computes them in the original.

Weights may be computed at every call: by parametrizations (torch.nn.utils.parametrize, its weight_norm and spectral_norm) or by hooks
(torch.nn.utils.weight_norm and spectral_norm, torch.nn.utils.prune). What a student inherits, rounds and exports is their result.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autocompress.errors import UsageError, one_line


def own_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU; the model stays where it is and as it is.

    What a hook has computed belongs to the graph of autograd, which cannot be copied: the copy gets its value.
    Raises UsageError for a model that holds what cannot be copied, such as a lock or an open file.
    """
    kept = (value for module in model.modules() for value in (*vars(module).values(), *module._buffers.values()))
    computed = [value for value in kept if isinstance(value, Tensor) and not value.is_leaf]
    try:
        duplicate = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # whatever the user's own attributes raise
        raise UsageError(
            f"a model must be one that copy.deepcopy can copy, but it raised {one_line(error)}",
            hint="make what cannot be copied (locks, files, generators) where it is used, not as attributes of modules",
        ) from None
    return duplicate.cpu().eval()


def fold_computed_weights(model: nn.Module) -> None:
    """Put parameters in place of weights that are computed at every call (in place: give a copy)."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _fold_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)


@torch.no_grad()
def _fold_parametrizations(module: Any) -> None:
    """Not by torch's `remove_parametrizations`: it takes the property from a class that a copy shares with its original."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    trained = {name for name, made in module.parametrizations.items() if any(True for _ in made.parameters(recurse=False))}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        if name in trained:
            setattr(module, name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
