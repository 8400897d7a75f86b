from __future__ import annotations

import errno
import math
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autocompress import data as module
from autocompress.data import Data, Split, sample, shifted, stratified
from autocompress.errors import RunFolderError, UsageError
from autocompress.images import cache_folder
from autocompress.sources import as_data, load_data


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.05, 0.6))
def test_a_stratified_part_holds_its_share_of_every_class(labels, fraction):
    targets = torch.tensor(labels)
    rest, part = stratified(targets, fraction)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        assert int((targets[part] == label).sum()) == min(max(1, round(fraction * count)), count - 1)
        assert int((targets[rest] == label).sum()) >= 1


@pytest.mark.parametrize("targets", [torch.arange(400) % 4, torch.rand(400), torch.arange(400), torch.rand(400, 2)])
def test_a_sample_is_always_the_same_and_grows_with_its_size(targets):
    split = Split(torch.arange(400.0).unsqueeze(1), targets)
    few, many = sample(split, 40), sample(split, 90)
    assert (len(few), len(many)) == (40, 90)
    assert torch.equal(few.inputs, sample(split, 40).inputs)
    assert set(few.inputs.flatten().tolist()) < set(many.inputs.flatten().tolist())
    assert sample(split, 400) is split


def test_splits_do_not_depend_on_the_global_seed():
    targets = torch.arange(100) % 7
    torch.manual_seed(1)
    one = stratified(targets, 0.2)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, stratified(targets, 0.2), strict=True))


def test_digits_are_ten_classes_in_three_disjoint_splits():
    data = load_data("digits")
    splits = (data.train, data.val, data.test)
    assert sum(len(split) for split in splits) == 1797
    assert data.input_shape == (1, 8, 8)
    assert all(split.targets.unique().tolist() == list(range(10)) for split in splits)
    seen = [{tuple(x.flatten().tolist()) for x in split.inputs} for split in splits]
    assert not seen[0] & seen[2] and not seen[1] & seen[2] and not seen[0] & seen[1]


def images(n=40, **options):
    inputs = torch.randint(0, 256, (n, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(inputs, torch.arange(n) % 4)
    return Data(split, split[slice(0, 9)], split[slice(9, 20)], classes=4, **options)


@pytest.mark.parametrize("options", [{}, {"flip": True}])
def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(options):
    data, whole = images(shift=2, **options), torch.arange(40)
    view = data.view(whole, epoch=3, seed=1)
    order = torch.randperm(40)
    torch.rand(7)
    again = torch.cat([data.view(part, epoch=3, seed=1) for part in order.split(7)])
    assert torch.equal(again, view[order])
    assert not torch.equal(view, data.view(whole, epoch=4, seed=1))
    assert not torch.equal(view, data.view(whole, epoch=3, seed=2))


def test_two_epochs_show_both_sides_of_every_image():
    data, whole = images(flip=True), torch.arange(40)
    even, odd, plain = data.view(whole, 0), data.view(whole, 1), data.prepare(data.train.inputs)
    assert torch.equal(even, odd.flip(-1))
    mirrored = [torch.equal(a, b) for a, b in zip(even, plain.flip(-1), strict=True)]
    assert all(torch.equal(a, b) or m for a, b, m in zip(even, plain, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32


@settings(deadline=None)
@given(st.integers(-2, 2), st.integers(-2, 2))
def test_a_shift_is_a_crop_of_the_reflected_image(dy, dx):
    batch = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    padded = F.pad(batch, (2, 2, 2, 2), mode="reflect")
    expected = padded[:, :, 2 + dy : 8 + dy, 2 + dx : 7 + dx]
    assert torch.equal(shifted(batch, torch.tensor([[dy, dx]] * 2)), expected)


def test_uint8_images_are_normalised_and_others_left_alone():
    data = images(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    x = data.prepare(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    assert x.flatten().tolist() == [1.0, 0.75, 0.5]
    assert data.prepare(torch.ones(2, 3)).equal(torch.ones(2, 3))
    before = data.train.inputs.clone()
    data.view(torch.arange(5), 0)
    assert torch.equal(data.train.inputs, before)


def test_batches_are_the_split_in_order():
    data = images()
    parts = list(data.batches(data.test, 4))
    assert [len(x) for x, _ in parts] == [4, 4, 3]
    assert torch.equal(torch.cat([y for _, y in parts]), data.test.targets)


def test_calibration_inputs_are_the_same_for_every_caller():
    data = images(flip=True, shift=1)
    torch.manual_seed(5)
    eight = torch.cat(list(data.calibration(8, 3)))
    assert torch.equal(eight, torch.cat(list(data.calibration(8, 8))))
    assert [len(batch) for batch in data.calibration(1000, 16)] == [16, 16, 8]


def test_of_huge_inputs_fewer_are_drawn(monkeypatch):
    data = images()
    train = Split(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(600, 3, 1024, 1024), torch.arange(600) % 4)
    huge = replace(data, train=train, val=train, test=train)
    assert huge.at_most(512, 2**30) == 85
    assert huge.at_most(512, 1) == 1
    assert data.at_most(512, 2**30) == 512
    monkeypatch.setattr(module, "CALIBRATION_BYTES", 3 * 4 * 3 * 6 * 5)
    assert [len(batch) for batch in data.calibration(8, 2)] == [2, 1]


def test_parts_of_a_split_are_views_of_one_array():
    inputs = torch.arange(60.0).view(20, 3)
    whole = Split(inputs, torch.arange(20))
    part = whole[torch.tensor([7, 3, 11, 3])]
    inner = part[slice(1, 4)][torch.tensor([2, 0])]
    assert torch.equal(part.inputs, inputs[[7, 3, 11, 3]])
    assert torch.equal(inner.inputs, inputs[[3, 3]])
    assert inner.targets.tolist() == [3, 3]
    assert torch.equal(part.rows(torch.tensor([2, 0])), inputs[[11, 7]])
    assert torch.equal(whole[inputs[:, 0] > 50].inputs, inputs[17:])
    assert (len(part), part.input_shape) == (4, (3,))
    for split in (part, inner, whole[slice(2, 5)]):
        assert split._array.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_floating_point_inputs_reach_the_model_in_float32(dtype):
    inputs = np.random.default_rng(0).random((12, 3)).astype(dtype)
    split = Split(inputs, np.arange(12) % 3)
    data = Data(split, split, split)
    drawn = [data.example(2), data.view(torch.arange(4), 0), *data.calibration(5, 2), *(x for x, _ in data.batches(data.val, 5))]
    assert {x.dtype for x in drawn} == {torch.float32}
    assert torch.equal(data.example(2), torch.from_numpy(inputs[:2]).float())


def test_inputs_of_reversed_channels_are_taken():
    inputs = np.zeros((4, 3, 2, 2), dtype=np.uint8)[:, ::-1]
    assert Split(inputs, [0, 1, 0, 1]).input_shape == (3, 2, 2)


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint8, np.int64, np.bool_])
def test_classes_are_counted_and_converted(dtype):
    targets = (np.arange(12) % 2).astype(dtype)
    split = Split(np.zeros((12, 3), np.float32), targets)
    data = Data(split, split[slice(0, 4)], split[torch.arange(5)])
    assert data.classes == 2
    assert {part.targets.dtype for part in (data.train, data.val, data.test)} == {torch.int64}
    assert data.test.targets.tolist() == [0, 1, 0, 1, 0]
    assert replace(data, classes=7).classes == 7


ZEROS = torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    ("targets", "message", "hint"),
    [
        (ZEROS.float(), r"whole numbers, the classes, but those of val are torch\.float32", "int64"),
        (ZEROS.double(), r"torch\.float64", "loss and score"),
        (ZEROS.view(6, 1), r"one class a row, of shape \(6,\), but those of val have shape \(6, 1\)", "targets[:, 0]"),
        (torch.eye(6).long(), r"shape \(6, 6\)", "argmax"),
        (ZEROS - 1, r"labels must lie in 0\.\.3, but those of val reach from -1 to -1", "from 0"),
        (ZEROS + 4, r"0\.\.3, but those of val reach from 4 to 4", "from 0"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets, message, hint):
    data, pixels = images(), torch.zeros(6, 3, 6, 5, dtype=torch.uint8)
    with pytest.raises(UsageError, match=message) as caught:
        replace(data, val=Split(pixels, targets))
    assert hint in caught.value.hint
    own = replace(data, val=Split(pixels, targets), loss=F.cross_entropy, score=lambda outputs, targets: 0.0)
    assert torch.equal(own.val.targets, targets), "a loss of one's own takes what it likes"


@pytest.mark.parametrize("inputs", [(torch.zeros(4, 2), torch.zeros(4, 3)), [np.zeros((4, 2))] * 2, {"a": torch.zeros(4, 2)}])
def test_several_inputs_are_refused_by_name(inputs):
    with pytest.raises(UsageError, match="models with several inputs are not supported yet"):
        Split(inputs, torch.zeros(4))


def test_splits_that_do_not_hold_together_are_refused():
    good = images()
    with pytest.raises(UsageError, match="val split"):
        replace(good, val=good.val[slice(0, 0)])
    with pytest.raises(UsageError, match="as many targets as inputs"):
        replace(good, train=Split(good.train.inputs, good.train.targets[:3]))
    with pytest.raises(UsageError, match="its own `score`"):
        replace(good, loss=F.cross_entropy)


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
    assert data.input_shape == (3, 16, 16)
    assert data.train.inputs.dtype == torch.uint8
    assert (data.classes, len(data.train), len(data.val), len(data.test)) == (3, 21, 3, 6)
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


def test_held_out_folders_are_used_as_they_are(tmp_path, cache):
    write_images(tmp_path / "d" / "train")
    write_images(tmp_path / "d" / "val", n=4)
    data = load_data(f"imagefolder:{tmp_path / 'd'}?size=8&mean=0,0,0&std=1,1,1&flip=false")
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 12)
    assert (data.mean, data.std, data.flip) == ((0, 0, 0), (1, 1, 1), False)
    write_images(tmp_path / "d" / "test", classes=("cat", "cow"))
    with pytest.raises(UsageError, match="class folders of train"):
        load_data(f"imagefolder:{tmp_path / 'd'}?size=8")


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
    for splits in ((whole.train, whole.val, whole.test), (held_out.train, held_out.val)):
        assert len({split._array.data_ptr() for split in splits}) == 1
        seen = [{tuple(x.flatten().tolist()) for x in split.inputs} for split in splits]
        assert sum(map(len, seen)) == len(set.union(*seen)), "and no image is in two"


def test_grey_images_have_one_channel(tmp_path, cache):
    folder = write_images(tmp_path / "photos")
    colour, grey = load_data(f"imagefolder:{folder}?size=8"), load_data(f"imagefolder:{folder}?size=8&channels=1")
    assert (grey.input_shape, len(grey.mean), len(grey.std)) == ((1, 8, 8), 1, 1)
    assert colour.input_shape == (3, 8, 8)
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


SOURCE = """
import numpy as np
from autocompress import Data, Split
x, y = np.zeros((30, 4), dtype=np.float32), np.arange(30) % 3
def two(): return (x[:20], y[:20]), (x[20:], y[20:])
def three(): return (x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])
def floats(): return (x, y / 2), (x, y / 2)
def column(): return (x, y[:, None]), (x, y[:, None])
def several(): return ((x, x), y), ((x, x), y)
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


@pytest.mark.parametrize(("name", "sizes"), [("two", (18, 2, 10)), ("three", (10, 10, 10)), ("splits", (27, 3, 30))])
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
        ("several", "several inputs"),
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


def test_the_digest_tells_other_data_and_other_preparation_apart_but_reads_nothing_of_the_test_split():
    class Sealed(Split):
        def rows(self, index):
            raise AssertionError("the test split is read")

    def made(seed=0, labels=0, n=40, test=8, **how):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = torch.rand((n, 3, 4, 4), generator=generator), torch.arange(n).add(labels) % 4
        held_out = Sealed(torch.zeros(test, 3, 4, 4), torch.zeros(test, dtype=torch.long))
        return Data(Split(inputs, targets), Split(inputs[:8], targets[:8]), held_out, classes=4, **how)

    same, others = made(), [made(seed=1), made(labels=1), made(n=41), made(test=9), made(flip=True), made(mean=(0.5,) * 3, std=(1.0,) * 3)]
    assert same.digest == made().digest
    assert len({data.digest for data in (same, *others)}) == 1 + len(others)


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


@pytest.mark.parametrize("other", [torch.zeros(4, 3, 9, 8), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], ids=["shape", "type"])
@pytest.mark.parametrize("name", ["val", "test"])
def test_all_splits_hold_inputs_of_one_form(name, other):
    targets = torch.arange(4) % 2
    parts = {part: Split(torch.zeros(4, 3, 8, 8), targets) for part in ("train", "val", "test")} | {name: Split(other, targets)}
    with pytest.raises(UsageError, match=f"train has .* and {name} "):
        Data(**parts)


def test_floating_point_of_several_precisions_is_one_form():
    targets = torch.arange(4) % 2
    Data(Split(torch.zeros(4, 3), targets), Split(torch.zeros(4, 3, dtype=torch.float64), targets), Split(np.zeros((4, 3), "f2"), targets))
