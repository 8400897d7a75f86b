from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autocompress.data import Data, Split, load_data, sample, shifted, stratified
from autocompress.errors import UsageError
from autocompress.images import cache_folder


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
    assert torch.equal(data.calibration(8), data.calibration(8))
    assert data.calibration(1000).shape[0] == 40


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
    data = load_data(f"imagefolder:{tmp_path / 'd'}?size=8&mean=0,0,0&std=1,1,1&flip=no")
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 12)
    assert (data.mean, data.std, data.flip) == ((0, 0, 0), (1, 1, 1), False)
    write_images(tmp_path / "d" / "test", classes=("cat", "cow"))
    with pytest.raises(UsageError, match="class folders of train"):
        load_data(f"imagefolder:{tmp_path / 'd'}?size=8")


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
    folder = write_images(tmp_path / "photos", n=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 21 * 30)
    load_data(f"imagefolder:{folder}?size=8&flip=no")
    Image.new("RGB", (30, 60)).save(folder / "dog" / "huge.png")
    with pytest.raises(UsageError, match=r"huge\.png.* cannot be read: Image size"):
        load_data(f"imagefolder:{folder}?size=8")
    (folder / "dog" / "huge.png").unlink()
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match=r"gone\.png.* cannot be read: No such file"):
        load_data(f"imagefolder:{folder}?size=8")


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


@pytest.mark.parametrize(("name", "sizes"), [("two", (18, 2, 10)), ("three", (10, 10, 10))])
def test_a_function_may_return_arrays(source, name, sizes):
    data = load_data(f"{source}:{name}")
    assert data.classes == 3
    assert data.train.targets.dtype == torch.long
    assert sum(map(len, (data.train, data.val, data.test))) == 30
    assert len(data.test) == sizes[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", "whole numbers"),
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
        ("torchvision:CIFAR10?root=/absent", "is not in '/absent'"),
        ("torchvision:CIFAR12", "unknown data set"),
        ("torchvision:os", "unknown data set"),
        ("torchvision:CIFAR10?rooot=x", "unknown option 'rooot'"),
        ("imagefolder:/absent", "does not exist"),
        ("imagefolder:.", "one folder a class"),
        ("imagefolder:.?size=0", "size"),
        ("imagefolder:.?size=²", "size"),
        ("imagefolder:.?sise=8", "unknown option 'sise'"),
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
