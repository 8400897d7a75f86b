"""Decode a folder of class folders into one uint8 array, once; later runs map the file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from autocompress.errors import RunFolderError, UsageError
from autocompress.system.cache import FREE_SPACE, cache_folder
from autocompress.system.machine import is_running
from autocompress.system.progress import PhaseTick
from autocompress.units import format_size

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
RESIZE = 256 / 224  # shorter side against crop, the usual evaluation of ImageNet models
ABANDONED_S = 3600.0
"""Without anybody writing it for so long, a file is nobody's."""
CANNOT_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that keep no blocks for later."""


EIGHT_BITS, SIXTEEN_BITS = 2**8 - 1, 2**16 - 1


def decode_folder(folder: Path, size: int, channels: int = 3, tick: PhaseTick | None = None) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """((images n x channels x size x size uint8, labels n), class names in order) of `folder/CLASS/*.jpg`.

    Images are resized and cropped in the middle; `channels` is 3 (colour) or 1 (grey). Hidden folders are none of the classes. Raises
    UsageError for an empty folder, a class without images or a broken image, RunFolderError when the disk of the cache is too small.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [(p, i) for i, c in enumerate(classes) for p in sorted((folder / c).rglob("*")) if p.suffix.lower() in EXTENSIONS]
    if not files:
        raise UsageError(
            f"{str(folder)!r} must hold one folder a class with images in it, but there is none",
            hint="put the images of each class into a folder of its own, as DIR/cat/1.jpg",
        )
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if empty:
        raise UsageError(
            f"each folder of {str(folder)!r} must hold images of its class, but {classes[empty[0]]!r} holds none",
            hint=f"remove it, or add images (files that end in {', '.join(sorted(EXTENSIONS))})",
        )
    labels = torch.tensor([label for _, label in files], dtype=torch.long)
    return (torch.from_numpy(_decoded(folder, [path for path, _ in files], size, channels, tick)), labels), classes


def _decoded(folder: Path, files: list[Path], size: int, channels: int, tick: PhaseTick | None) -> np.ndarray:
    stamp = "\n".join(map(_stamp, files))
    form = f"{size}" if channels == 3 else f"{size}, {channels} channels"
    name = hashlib.sha256(f"{folder.resolve()}\n{form}\n{stamp}".encode(errors="surrogateescape")).hexdigest()[:24]
    target = cache_folder() / "images" / f"{name}.npy"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.npy")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent)
            _decode_all(files, size, channels, partial, tick)
            partial.replace(target)
        except OSError as error:
            raise UsageError(f"the cache {str(target.parent)!r} cannot be written: {error.strerror}", hint=FREE_SPACE) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    return np.load(target, mmap_mode="c")


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed had begun to decode, which may be gigabytes; not what another machine may be writing."""
    for left in folder.glob("*.*.npy"):
        process = left.suffixes[-2].removeprefix(".")
        with contextlib.suppress(OSError):  # somebody else's
            is_old = time.time() - left.stat().st_mtime > ABANDONED_S
            if process.isdecimal() and is_old and not is_running(int(process)):
                left.unlink()


def _stamp(path: Path) -> str:
    """Other for a file that has changed."""
    try:
        status = path.stat()
    except OSError as error:  # a link to nowhere, or no permission
        raise _unreadable(path, error.strerror) from None
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


def _unreadable(path: Path, reason: object) -> UsageError:
    return UsageError(f"the image {str(path)!r} cannot be read: {reason}", hint="remove or replace it")


def _decode_all(files: list[Path], size: int, channels: int, target: Path, tick: PhaseTick | None) -> None:
    shape = (len(files), channels, size, size)
    _require_space(target.parent, math.prod(shape))
    array = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    _reserve(target)

    def store(item: tuple[int, Path]) -> None:
        array[item[0]] = _decode(item[1], size, channels)

    with ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(store, enumerate(files)), 1):
            if tick is not None:
                tick("decoding images", done, len(files))
    array.flush()


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _full(folder, f"{format_size(needed)} are needed, but {format_size(free)} are free")


def _reserve(file: Path) -> None:
    """Give a file its blocks: to write to a mapped file with holes on a full disk is SIGBUS, not an error."""
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno not in CANNOT_RESERVE:
                raise _full(file.parent, error.strerror or "no space is left") from None


def _full(folder: Path, why: str) -> RunFolderError:
    return RunFolderError(f"the decoded images do not fit into the cache {str(folder)!r}: {why}", hint=FREE_SPACE)


def _decode(path: Path, size: int, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = _in_8_bits(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises depends on the format
        raise _unreadable(path, error) from None
    if image.size == (size, size):  # made for this size: nothing to cut off
        return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    scale = round(size * RESIZE) / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, channels).transpose(2, 0, 1)


def _in_8_bits(image: Image) -> Image:
    """Grey images of more bits with their whole range in 8; Pillow would make all that is not nearly black white.

    Raises ValueError where nothing tells the range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    from PIL.Image import fromarray

    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > SIXTEEN_BITS:
        raise ValueError(f"its values lie in [{low:g}, {high:g}], and images have 8 or 16 bits: convert it")
    is_deep = image.mode.startswith("I;16") or high > EIGHT_BITS
    return fromarray((values * (EIGHT_BITS / SIXTEEN_BITS) if is_deep else values).round().astype(np.uint8))
