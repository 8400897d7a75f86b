"""Data from references, folders of images and functions: what is taken, and what is refused by name."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from autocompress.data.sources import as_data, load_data
from autocompress.errors import RunFolderError, UsageError
from autocompress.system.cache import cache_folder

NOBODY = 2**22 + 1
"""No process of Linux has this number."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "autocompress" / "images"


def write_images(folder, classes=("cat", "dog", "ü fish"), n=10):
    generator = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(n):
            pixels = generator.integers(0, 10, (20 + index, 30, 3), dtype=np.uint8) + 80 * level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_of_images_is_split_and_decoded_once(tmp_path, cache):
    folder = write_images(tmp_path / "my photos")
    data = load_data(f"imagefolder:{folder}?size=16")
    assert data.train.input_shapes == ((3, 16, 16),)
    assert data.train.inputs.dtype == torch.uint8
    assert (data.classes, len(data.train), len(data.val), len(data.test)) == (3, 21, 3, 6)
    assert data.class_names == ("cat", "dog", "ü fish")
    brightness = data.train.inputs.float().mean((1, 2, 3))
    assert torch.equal((brightness // 80).long(), data.train.targets), "labels belong to their images"
    written = list(cache.iterdir())
    assert len(written) == 1
    stamp = written[0].stat().st_mtime_ns
    assert torch.equal(load_data(f"imagefolder:{folder}?size=16").test.inputs, data.test.inputs)
    assert written[0].stat().st_mtime_ns == stamp
    os.utime(folder / "cat" / "0.png", (1, 1))
    load_data(f"imagefolder:{folder}?size=16")
    assert len(list(cache.iterdir())) == 2, "a changed image is decoded again"


def test_decoding_tells_how_far_it_is_and_can_be_interrupted(tmp_path, cache):
    folder, told = write_images(tmp_path / "photos"), []

    def interrupted(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_data(f"imagefolder:{folder}?size=8", interrupted)
    assert not list(cache.iterdir()), "half of the images are none"
    load_data(f"imagefolder:{folder}?size=8", lambda *state: told.append(state))
    assert told == [("decoding images", done, 30) for done in range(1, 31)]


def test_held_out_folders_are_used_as_they_are(tmp_path, cache):
    write_images(tmp_path / "d" / "train")
    write_images(tmp_path / "d" / "val", n=4)
    data = load_data(f"imagefolder:{tmp_path / 'd'}?size=8&mean=0,0,0&std=1,1,1&flip=false")
    assert (len(data.train), len(data.val), len(data.test)) == (30, 6, 6), "what is held out is halved: the model has seen the rest"
    assert not data.note
    assert (data.mean, data.std, data.flip) == ((0, 0, 0), (1, 1, 1), False)
    write_images(tmp_path / "d" / "test", classes=("cat", "cow"))
    with pytest.raises(UsageError, match="must be among those of train, but 'cow' is not"):
        load_data(f"imagefolder:{tmp_path / 'd'}?size=8")


def test_a_held_out_part_may_lack_a_class(tmp_path, cache):
    write_images(tmp_path / "d" / "training", classes=("ant", "bee", "cat"))
    write_images(tmp_path / "d" / "testing", classes=("ant", "cat"), n=4)
    data = load_data(f"imagefolder:{tmp_path / 'd'}?size=8")
    assert data.classes == 3
    assert sorted(torch.cat([data.val.targets, data.test.targets]).unique().tolist()) == [0, 2]


def test_one_held_out_image_a_class_is_halved_too(tmp_path, cache):
    write_images(tmp_path / "d" / "train")
    write_images(tmp_path / "d" / "test", n=1)
    data = load_data(f"imagefolder:{tmp_path / 'd'}?size=8")
    assert sorted([len(data.val), len(data.test)]) == [1, 2]


def test_a_folder_beside_the_three_is_none_of_them(tmp_path, cache):
    for name, n in (("train", 10), ("val", 4), ("test", 5), ("training", 9)):
        write_images(tmp_path / "d" / name, n=n)
    assert len(load_data(f"imagefolder:{tmp_path / 'd'}?size=8").train) == 30


@pytest.mark.parametrize("inside", ["", "train"])
def test_where_nothing_is_held_out_that_is_said(tmp_path, cache, inside):
    write_images(tmp_path / "d" / inside)
    data = load_data(f"imagefolder:{tmp_path / 'd'}?size=8")
    assert (len(data.train), len(data.val), len(data.test)) == (21, 3, 6)
    assert "was trained on them" in data.note


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALIDATION"])
def test_validation_images_are_found_by_any_of_their_usual_names(tmp_path, cache, name):
    """Else they would be ignored, and policies be chosen by images that the model was trained on."""
    folder = tmp_path / "d"
    write_images(folder / "train")
    write_images(folder / name, n=4)
    write_images(folder / "test", n=5)
    data = load_data(f"imagefolder:{folder}?size=8")
    assert (len(data.train), len(data.val), len(data.test)) == (30, 12, 15)


def test_a_folder_that_may_be_what_is_missing_is_asked_about(tmp_path, cache):
    folder = tmp_path / "d"
    write_images(folder / "train")
    write_images(folder / "dev", n=4)
    with pytest.raises(UsageError, match=r"holds train, but no val, and 'dev', which is none of train, training, val, valid") as caught:
        load_data(f"imagefolder:{folder}?size=8")
    assert "taken from the other one, or from train" in caught.value.hint
    write_images(folder / "val", n=4)
    write_images(folder / "test", n=5)
    assert len(load_data(f"imagefolder:{folder}?size=8").val) == 12, "nothing is missing"


def test_a_class_may_be_called_train(tmp_path, cache):
    data = load_data(f"imagefolder:{write_images(tmp_path / 'vehicles', classes=('bus', 'train'))}?size=8")
    assert (data.classes, len(data.train) + len(data.val) + len(data.test)) == (2, 20)


def test_a_file_name_need_not_be_text(tmp_path, cache):
    folder = write_images(tmp_path / "photos")
    try:
        (folder / "cat" / "0.png").rename(os.fsdecode(os.fsencode(folder / "cat") + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system keeps names as text")
    assert load_data(f"imagefolder:{folder}?size=8").classes == 3


def test_images_of_16_bits_are_not_white(tmp_path, cache):
    """X-rays and microscopes write them; cut off at 255 they hold nothing."""
    folder = write_images(tmp_path / "photos", classes=("dark", "light"), n=5)
    for level, name in enumerate(("dark", "light")):
        for index in range(5):
            Image.fromarray(np.full((16, 16), 20_000 + 30_000 * level, dtype=np.uint16)).save(folder / name / f"{index}.png")
    data = load_data(f"imagefolder:{folder}?size=8&channels=1")
    brightness = torch.cat([split.inputs.float().mean((1, 2, 3)) for split in (data.train, data.val, data.test)])
    assert sorted({round(float(b)) for b in brightness}) == [78, 195]
    Image.fromarray(np.full((16, 16), 1e6, dtype=np.float32)).save(folder / "dark" / "0.tiff")
    with pytest.raises(UsageError, match=r"0\.tiff.* its values lie in \[1e\+06, 1e\+06\]"):
        load_data(f"imagefolder:{folder}?size=8&channels=1")


def test_hidden_folders_are_no_classes_and_a_class_without_images_is_named(tmp_path, cache):
    folder = write_images(tmp_path / "photos")
    (folder / ".ipynb_checkpoints").mkdir()
    assert load_data(f"imagefolder:{folder}?size=8").classes == 3
    (folder / "yak").mkdir()
    (folder / "yak" / "notes.txt").write_text("none yet")
    with pytest.raises(UsageError, match="'yak' holds none"):
        load_data(f"imagefolder:{folder}?size=8")


@pytest.mark.parametrize("where", range(2))
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_inputs_that_are_not_finite_are_named_by_their_split(where, value):
    splits = [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(3)]
    splits[where][0][2, 1] = value
    with pytest.raises(UsageError, match=f"inputs must be finite, but some of {('train', 'val')[where]} are"):
        as_data(splits, "data")


def test_broken_images_are_named_and_nothing_is_left_behind(tmp_path, cache):
    folder = write_images(tmp_path / "photos", n=2)
    broken = folder / "dog" / "1.png"
    whole = broken.read_bytes()
    generator = np.random.default_rng(0)
    flipped = bytearray(whole)
    flipped[12] ^= 0xFF
    for content in (b"", b"no image", whole[: len(whole) // 2], bytes(flipped), generator.bytes(300)):
        broken.write_bytes(content)
        with pytest.raises(UsageError, match=r"1\.png"):
            load_data(f"imagefolder:{folder}?size=8")
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_had_begun_to_decode_is_removed(tmp_path, cache):
    folder = write_images(tmp_path / "photos")
    cache.mkdir(parents=True, exist_ok=True)
    left, running, recent = cache / f"abc.{NOBODY}.npy", cache / f"abc.{os.getppid()}.npy", cache / f"def.{NOBODY}.npy"
    for path in (left, running, recent):
        path.write_bytes(b"half")
    for path in (left, running):
        os.utime(path, (1.0, 1.0))
    load_data(f"imagefolder:{folder}?size=8")
    assert running.exists() and not left.exists()
    assert recent.exists(), "a process of another machine may write it, whose numbers say nothing here"


def test_a_link_to_nowhere_and_a_picture_that_unpacks_to_too_much_are_named(tmp_path, cache, monkeypatch):
    folder = write_images(tmp_path / "photos", n=4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    Image.new("RGB", (60, 60)).save(folder / "dog" / "huge.png")
    with pytest.raises(UsageError, match=r"huge\.png.* cannot be read: Image size"):
        load_data(f"imagefolder:{folder}?size=8")
    (folder / "dog" / "huge.png").unlink()
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match=r"gone\.png.* cannot be read: No such file"):
        load_data(f"imagefolder:{folder}?size=8")


def test_splits_of_a_folder_share_its_mapped_file(tmp_path, cache):
    """A copy of the training images may be larger than memory."""
    whole = load_data(f"imagefolder:{write_images(tmp_path / 'photos')}?size=8")
    write_images(tmp_path / "d" / "train")
    write_images(tmp_path / "d" / "test", n=4)
    held_out = load_data(f"imagefolder:{tmp_path / 'd'}?size=8")
    for splits in ((whole.train, whole.val, whole.test), (held_out.val, held_out.test)):
        assert len({split._inputs.data_ptr() for split in splits}) == 1
        seen = [{tuple(x.flatten().tolist()) for x in split.inputs} for split in splits]
        assert sum(map(len, seen)) == len(set.union(*seen)), "and no image is in two"


def test_grey_images_have_one_channel(tmp_path, cache):
    folder = write_images(tmp_path / "photos")
    colour, grey = load_data(f"imagefolder:{folder}?size=8"), load_data(f"imagefolder:{folder}?size=8&channels=1")
    assert (grey.train.input_shapes, len(grey.mean), len(grey.std)) == (((1, 8, 8),), 1, 1)
    assert colour.train.input_shapes == ((3, 8, 8),)
    difference = grey.train.inputs.float().mean((1, 2, 3)) - colour.train.inputs.float().mean((1, 2, 3))
    assert difference.abs().max() < 4
    with pytest.raises(UsageError, match="channels must be 3"):
        load_data(f"imagefolder:{folder}?size=8&channels=4")
    with pytest.raises(UsageError, match="mean must hold 1 numbers"):
        load_data(f"imagefolder:{folder}?size=8&channels=1&mean=1,2,3")


def test_a_disk_without_room_for_the_images_is_told_before_they_are_decoded(tmp_path, cache, monkeypatch):
    folder, usage = write_images(tmp_path / "photos", n=2), namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(RunFolderError, match=r"do not fit into the cache .* are needed, but .* are free") as caught:
        load_data(f"imagefolder:{folder}?size=64")
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_the_cache_is_no_file_with_holes(tmp_path, cache, monkeypatch):
    folder, reserved = write_images(tmp_path / "photos", n=4), []

    def reserve(file, start, size, code=errno.ENOSPC):
        reserved.append((start, size))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(RunFolderError, match="No space left"):
        load_data(f"imagefolder:{folder}?size=8")
    assert list(cache.iterdir()) == []
    assert reserved[0][0] == 0 and reserved[0][1] >= 12 * 3 * 8 * 8
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: reserve(*arguments, code=errno.EOPNOTSUPP))
    assert load_data(f"imagefolder:{folder}?size=8").classes == 3


def test_a_cache_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "photos", n=2)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be written") as caught:
        load_data(f"imagefolder:{folder}?size=8")
    assert "XDG_CACHE_HOME" in caught.value.hint


def nobody():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("home", ["a file", "nobody", "a folder"])
def test_the_cache_is_in_home_where_that_can_be_written(tmp_path, monkeypatch, home):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / ("home" if home == "a folder" else "file")))
    if home == "nobody":
        monkeypatch.setattr("pathlib.Path.home", nobody)
    expected = tmp_path / "home" / ".cache" / "autocompress" if home == "a folder" else tmp_path / "temporary"
    assert cache_folder().is_relative_to(expected)


def test_a_cache_in_a_folder_of_everybody_is_ones_own(tmp_path, monkeypatch):
    """Who knows the name could have made it before, and put in what we would read."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pathlib.Path.home", nobody)
    usual = cache_folder()
    assert usual == cache_folder() and usual.stat().st_mode & 0o077 == 0
    usual.rename(tmp_path / "theirs")
    usual.symlink_to(tmp_path / "theirs")
    assert cache_folder() != usual
    assert cache_folder() == cache_folder(), "what is kept there is found again"


SOURCE = """
import numpy as np
from autocompress import Data, Split
x, y = np.zeros((30, 4), dtype=np.float32), np.arange(30) % 3
def two(): return (x[:20], y[:20]), (x[20:], y[20:])
def three(): return (x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])
def floats(): return (x, y / 2), (x, y / 2)
def column(): return (x, y[:, None]), (x, y[:, None])
def several(): return ((x, x[:9]), y), ((x, x), y)
def long(): return (x, x, y), (x, x, y)
def negative(): return (x, y - 1), (x, y)
def splits(): return Split(x, y), Split(x, y)
def one(): return (x, y)
def ragged(): return (x[:20], y[:19]), (x[20:], y[20:])
def scalars(): return (1, 2), (3, 4)
def words(): return (x, ["a"] * 30), (x, y)
def nothing(): pass
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(("name", "sizes"), [("two", (20, 6, 4)), ("three", (10, 10, 10)), ("splits", (30, 15, 15))])
def test_a_function_may_return_arrays(source, name, sizes):
    data = load_data(f"{source}:{name}")
    assert data.classes == 3
    assert data.train.targets.dtype == torch.long
    assert (len(data.train) + len(data.val), len(data.test)) == (sizes[0] + sizes[1], sizes[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", "whole numbers"),
        ("column", "one class a row"),
        ("several", "a row for each example"),
        ("long", "arrays"),
        ("negative", "labels must lie in"),
        ("ragged", "as many targets"),
        ("scalars", "arrays"),
        ("words", "arrays"),
        ("nothing", "NoneType"),
        ("absent", "no function"),
    ],
)
def test_what_a_function_must_not_return(source, name, message):
    with pytest.raises(UsageError, match=message):
        load_data(f"{source}:{name}")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("digit", "unknown data"),
        ("digits?size=3", "unknown option 'size'"),
        ("own.py:f?size=3", "unknown option 'size'"),
        ("torchvision:CIFAR10?root=/absent", "CIFAR10 cannot be read from '/absent'"),
        ("torchvision:CIFAR12", "unknown data set"),
        ("torchvision:os", "unknown data set"),
        ("torchvision:CIFAR10?rooot=x", "unknown option 'rooot'"),
        ("imagefolder:/absent", "does not exist"),
        ("imagefolder:.", "one folder a class"),
        ("imagefolder:.?size=0", "size"),
        ("imagefolder:.?size=²", "size"),
        ("imagefolder:.?sise=8", "unknown option 'sise'"),
        ("imagefolder:.?channels=2", "channels must be 3"),
    ],
)
def test_references_that_name_no_data(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_data(reference)


@pytest.mark.parametrize("option", ["mean=1,2", "std=a,b,c", "mean="])
def test_normalisation_has_a_number_for_each_channel(tmp_path, cache, option):
    folder = write_images(tmp_path / "photos", n=4)
    with pytest.raises(UsageError, match=option.partition("=")[0]):
        load_data(f"imagefolder:{folder}?size=8&{option}")


def test_images_that_have_the_size_are_taken_as_they_are(tmp_path):
    generator = np.random.default_rng(0)
    pixels = {name: generator.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8) for name in ("a", "b")}
    for name, images in pixels.items():
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    data = load_data(f"imagefolder:{tmp_path}?size=12")
    kept = [image.tobytes() for split in (data.train, data.val, data.test) for image in split.inputs.permute(0, 2, 3, 1).numpy()]
    assert sorted(kept) == sorted(image.tobytes() for images in pixels.values() for image in images)


def test_a_mistyped_flag_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        for index in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(UsageError, match="flip must be true or false, but got 'ture'"):
        load_data(f"imagefolder:{tmp_path}?size=8&flip=ture")
