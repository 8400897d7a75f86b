from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.batch import joined, names_of, tensors_of
from autocompress.data import Data, Split, sample, shifted, stratified
from autocompress.data import splits as module
from autocompress.data.sources import load_data
from autocompress.errors import UsageError


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
    assert data.train.input_shapes == ((1, 8, 8),)
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


def test_what_normalises_images_is_known_and_of_other_inputs_there_is_nothing_to_know():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(pixels, torch.tensor([0, 1]))
    for data in (Data(split, split, split, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)), Data(split, split, split)):
        known = data.normalisation
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (known.mean, known.std))
        assert torch.allclose((pixels / 255 - mean) / std, data.prepare(pixels))
    floats = Split(pixels.float(), torch.tensor([0, 1]))
    assert Data(floats, floats, floats).normalisation is None


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
    eight = torch.cat(list(data.calibration_batches(8, 3)))
    assert torch.equal(eight, torch.cat(list(data.calibration_batches(8, 8))))
    assert [len(batch) for batch in data.calibration_batches(1000, 16)] == [16, 16, 8]


def test_of_huge_inputs_fewer_are_drawn(monkeypatch):
    data = images()
    train = Split(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(600, 3, 1024, 1024), torch.arange(600) % 4)
    huge = replace(data, train=train, val=train, test=train)
    assert huge.at_most(512, 2**30) == 85
    assert huge.at_most(512, 1) == 1
    assert data.at_most(512, 2**30) == 512
    monkeypatch.setattr(module, "CALIBRATION_BYTES", 3 * 4 * 3 * 6 * 5)
    assert [len(batch) for batch in data.calibration_batches(8, 2)] == [2, 1]


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
    assert (len(part), part.input_shapes) == (4, ((3,),))
    for split in (part, inner, whole[slice(2, 5)]):
        assert split._inputs.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_floating_point_inputs_reach_the_model_in_float32(dtype):
    inputs = np.random.default_rng(0).random((12, 3)).astype(dtype)
    split = Split(inputs, np.arange(12) % 3)
    data = Data(split, split, split)
    drawn = [data.example(2), data.view(torch.arange(4), 0), *data.calibration_batches(5, 2), *(x for x, _ in data.batches(data.val, 5))]
    assert {x.dtype for x in drawn} == {torch.float32}
    assert torch.equal(data.example(2), torch.from_numpy(inputs[:2]).float())


def test_inputs_of_reversed_channels_are_taken():
    inputs = np.zeros((4, 3, 2, 2), dtype=np.uint8)[:, ::-1]
    assert Split(inputs, [0, 1, 0, 1]).input_shapes == ((3, 2, 2),)


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint8, np.int64, np.bool_])
def test_classes_are_counted_and_converted(dtype):
    targets = (np.arange(12) % 2).astype(dtype)
    split = Split(np.zeros((12, 3), np.float32), targets)
    data = Data(split, split[slice(0, 4)], split[torch.arange(5)])
    assert data.classes == 2
    assert {part.targets.dtype for part in (data.train, data.val, data.test)} == {torch.int64}
    assert data.test.targets.tolist() == [0, 1, 0, 1, 0]
    assert replace(data, classes=7).classes == 7


def test_columns_of_pandas_are_arrays_whatever_their_labels_are():
    """Rows that `train_test_split` has drawn keep their labels: 0 is among them, or not."""
    frame = pd.DataFrame({0: [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0], "label": [0, 1, 0]}, index=[7, 0, 3])
    split = Split(frame[[0, "b"]], frame["label"])
    assert split.inputs.tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    assert split.targets.tolist() == [0, 1, 0]
    with pytest.raises(UsageError, match="its inputs are DataFrame"):
        Split(frame.assign(b=["x", "y", "z"]), frame["label"])


def test_tensors_that_require_gradients_are_data():
    assert not Split(torch.ones(2, 3, requires_grad=True), [0, 1]).inputs.requires_grad


def test_pairs_are_splits():
    pair = np.zeros((4, 3), np.float32), [0, 1, 0, 1]
    assert len(Data(pair, pair, pair).val) == 4
    with pytest.raises(UsageError, match=r"must be \(inputs, targets\) arrays, but got ndarray"):
        Data(pair, pair, pair[0])


def test_each_class_has_a_name_or_none_has():
    split = Split(np.zeros((4, 3), np.float32), [0, 1, 0, 1])
    data = Data(split, split, split, class_names=("cat", "dog", "newt"))
    assert data.classes == 3, "one without an example has a name too"
    for names in (("cat", "dog"), (1, 2, 3), "abc"):
        with pytest.raises(UsageError, match=r"text for each of the 3 classes, but got " + re.escape(repr(names))):
            replace(data, class_names=names)
    assert replace(data, class_names=None).class_names == ()
    named = replace(data, class_names=np.array(["a", "b", "c"])).class_names
    assert named == ("a", "b", "c")
    assert {type(name) for name in named} == {str}


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


def several(n: int) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.arange(3 * n).view(n, 3),
        "mask": torch.ones(n, 3, dtype=torch.bool),
        "weights": torch.rand(n, 2, dtype=torch.float64),
    }


@pytest.mark.parametrize("given", [dict, lambda inputs: (*inputs.values(),), lambda inputs: [array.numpy() for array in inputs.values()]])
def test_several_inputs_are_cut_and_drawn_together(given):
    inputs = several(12)
    whole = Split(given(inputs), torch.arange(12) % 3)
    assert whole.input_shapes == ((3,), (3,), (2,))
    data = Data(whole[slice(0, 6)], whole[torch.tensor([7, 3])], whole[torch.tensor([11, 3, 5])][torch.tensor([2, 0])])
    assert torch.equal(tensors_of(data.test.inputs)[0], inputs["ids"][[5, 11]])
    drawn = data.prepare(data.val.rows(torch.tensor([1])))
    assert [tensor.dtype for tensor in tensors_of(drawn)] == [torch.int64, torch.bool, torch.float32]
    assert torch.equal(tensors_of(drawn)[0], inputs["ids"][[3]])
    assert names_of(drawn) == (tuple(inputs) if given is dict else ())
    assert [len(batch) for batch, _ in data.batches(data.train, 4)] == [4, 2]
    assert torch.equal(tensors_of(joined([*data.calibration_batches(6, 4)]))[0].sort(0).values, inputs["ids"][:6])
    assert torch.equal(tensors_of(data.view(torch.tensor([2, 1]), 5))[0], inputs["ids"][[2, 1]])


def test_one_named_input_is_augmented_like_one_without_a_name():
    images = torch.rand(6, 3, 8, 8)
    named, plain = (Data(*[Split(inputs, torch.arange(6) % 2)] * 3, flip=True, shift=2) for inputs in ({"pixels": images}, images))
    seen = named.view(torch.arange(6), 1)
    assert torch.equal(tensors_of(seen)[0], plain.view(torch.arange(6), 1))
    assert not torch.equal(tensors_of(seen)[0], images)


def test_one_input_may_be_named():
    split = Split({"pixels": np.zeros((4, 2))}, [0, 1, 0, 1])
    assert names_of(split.inputs) == ("pixels",)


@pytest.mark.parametrize("changed", ["ids", "mask", "weights"])
def test_the_digest_tells_all_inputs(changed):
    def made(inputs):
        split = Split(inputs, torch.arange(8) % 2)
        return Data(split, split, split)

    first, second = several(8), several(8)
    second["weights"] = first["weights"].clone()
    assert made(first).digest == made(second).digest
    second[changed][0, 0] = 0 if changed == "mask" else 7
    assert made(first).digest != made(second).digest
    renamed = {f"other_{name}": array for name, array in first.items()}
    assert len({made(first).digest, made(renamed).digest, made((*first.values(),)).digest}) == 3


@pytest.mark.parametrize(
    ("inputs", "message", "hint"),
    [
        ((torch.zeros(4, 2), torch.zeros(3, 2)), "must have a row for each example, but these have 4, 3 rows", "numpy.stack"),
        ([np.zeros(7)] * 4, "7 inputs and 4 targets", "numpy.stack"),
        ({"a": torch.zeros(4, 2), "b": "words"}, "its inputs 'b' are str", "numpy arrays"),
        ({}, "its inputs are dict", "numpy arrays"),
    ],
)
def test_several_inputs_that_are_none_are_refused(inputs, message, hint):
    with pytest.raises(UsageError, match=message) as error:
        Split(inputs, torch.zeros(4))
    assert hint in error.value.hint


@pytest.mark.parametrize("options", [{"flip": True}, {"shift": 1}])
def test_examples_of_several_inputs_are_not_augmented(options):
    pair = Split((torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)), [0, 1, 0, 1])
    with pytest.raises(UsageError, match="only examples of one input can be mirrored or shifted, but these have 2"):
        Data(pair, pair, pair, **options)


def test_each_of_several_inputs_is_checked():
    good, targets = several(4), [0, 1, 0, 1]
    bad = {**good, "weights": torch.full((4, 2), torch.nan)}
    with pytest.raises(UsageError, match="some of val are NaN"):
        Data((good, targets), (bad, targets), (good, targets))
    with pytest.raises(UsageError, match=r"ids \(3,\) int64 and mask \(3,\) bool and weights \(2,\) floating point and test"):
        Data((good, targets), (good, targets), ((*good.values(),), targets))


def test_splits_that_do_not_hold_together_are_refused():
    good = images()
    with pytest.raises(UsageError, match="val split"):
        replace(good, val=good.val[slice(0, 0)])
    with pytest.raises(UsageError, match="as many targets as inputs"):
        replace(good, train=Split(good.train.inputs, good.train.targets[:3]))
    with pytest.raises(UsageError, match="its own `score`"):
        replace(good, loss=F.cross_entropy)


def test_the_digest_tells_other_data_and_other_preparation_apart_but_reads_nothing_of_the_test_split():
    class Sealed(Split):
        def rows(self, index):
            raise AssertionError("the test split is read")

    def made(seed=0, labels=0, n=40, test=8, **how):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
        targets = torch.arange(n).add(labels) % 4
        held_out = Sealed(torch.zeros(test, 3, 4, 4, dtype=torch.uint8), torch.zeros(test, dtype=torch.long))
        return Data(Split(inputs, targets), Split(inputs[:8], targets[:8]), held_out, classes=4, **how)

    same, others = made(), [made(seed=1), made(labels=1), made(n=41), made(test=9), made(flip=True), made(mean=(0.5,) * 3, std=(1.0,) * 3)]
    assert same.digest == made().digest
    assert len({data.digest for data in (same, *others)}) == 1 + len(others)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5, 0.5)}, "both `mean` and `std`"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5, 0.5)}, "`mean` must have a value for each of the 3 channels"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "`std` must have a value for each of the 3 channels"),
        ({"mean": 0.5, "std": 0.5}, "`mean` must have a value for each of the 3 channels, but is 0.5"),
        ({"mean": (0.5,), "std": (0.0,)}, "`std` must be greater than zero"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "`mean` must lie in 0..1, since pixels are divided by 255"),
        ({"shift": 5}, "`shift` must lie in 0..4"),
        ({"shift": -1}, "`shift` must lie in 0..4"),
    ],
)
def test_what_is_asked_of_images_must_fit_them(changes, message):
    with pytest.raises(UsageError, match=message):
        images(**changes)


def test_only_images_are_shifted():
    split = Split(torch.rand(8, 5), torch.arange(8) % 2)
    with pytest.raises(UsageError, match="only images"):
        Data(split, split, split, shift=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_no_split_is_read_as_a_whole(dtype):
    """A part of a mapped file that is larger than memory would be copied into it."""

    class Large(Split):
        @property
        def inputs(self):
            pytest.fail("all inputs were asked for")

    whole = Split(torch.zeros(9, 3, 4, 4, dtype=dtype), torch.arange(9) % 3)
    split = Large(whole._inputs, whole.targets[:6], torch.arange(6))
    assert Data(split, split, split).classes == 3


def test_what_is_not_normalised_must_not_be_asked_to_be():
    split = Split(torch.rand(8, 3, 4, 4), torch.arange(8) % 2)
    with pytest.raises(UsageError, match=r"`mean` and `std` normalise images in uint8, but the inputs are \(3, 4, 4\) floating point"):
        Data(split, split, split, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("options", [{"flip": True}, {"shift": 1}])
def test_images_whose_targets_are_maps_are_not_augmented(options):
    split = Split(torch.rand(8, 3, 4, 4), torch.zeros(8, 4, 4, dtype=torch.long))
    how = {"loss": F.cross_entropy, "score": lambda outputs, targets: 0.0}
    with pytest.raises(UsageError, match=r"without their targets, but these are maps of shape \(4, 4\)"):
        Data(split, split, split, **how, **options)
    assert not Data(split, split, split, **how).is_augmented


def test_a_classifier_may_be_scored_otherwise():
    data = images(score=lambda outputs, targets: 0.5, score_name="F1")
    assert (data.classes, data.scored_by, data.decides) == (4, "F1", True)


@pytest.mark.parametrize(
    ("targets", "decides"),
    [(torch.arange(8) % 4, True), (torch.zeros(8, 4), False), (torch.full((8, 5, 5), 255), False), (torch.rand(8), False)],
    ids=["classes", "several labels", "maps of classes", "numbers"],
)
def test_only_one_class_a_row_is_a_decision(targets, decides):
    split = Split(torch.rand(8, 3, 4, 4), targets)
    data = Data(split, split, split, classes=4, loss=F.cross_entropy, score=lambda outputs, targets: 0.0)
    assert data.decides is decides


def test_what_was_found_finite_is_not_read_again(monkeypatch):
    split = Split(torch.rand(8, 3, 4, 4), torch.arange(8) % 2)
    data = Data(split, split[slice(0, 4)], split[slice(4, 8)])
    monkeypatch.setattr(torch, "isfinite", lambda tensor: pytest.fail("read again") if len(tensor) == 8 else torch.tensor(True))
    assert len(replace(data, val=split[slice(2, 5)]).val) == 3
