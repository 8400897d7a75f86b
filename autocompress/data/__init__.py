"""Data sets: splits in memory or on disk, and where they come from."""

from __future__ import annotations

from autocompress.data.splits import IMAGENET_MEAN, IMAGENET_STD, SPLITS, Data, Split, sample, sampled, shifted, stratified

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "SPLITS", "Data", "Split", "sample", "sampled", "shifted", "stratified"]
