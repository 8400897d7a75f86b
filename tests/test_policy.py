from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from autocompress.errors import UsageError
from autocompress.policy import KERNEL_BITS, STORAGE_BITS, DistillSpec, Policy, PruneSpec, QuantSpec, StudentSpec

EXAMPLES = [
    Policy(),
    Policy(student=StudentSpec(reference="torchvision:resnet18", width=0.5, widths={"b": 2.0, "a": 1.5}, drop=("y", "x"))),
    Policy(prune=PruneSpec(ratios={"layer1.conv": 0.1, "ünï": 0.0})),
    Policy(quant=QuantSpec(bits=8, layers={"head": 32, "body": 4}, reduced_range=True)),
    Policy(distill=DistillSpec(temperature=1 / 3, alpha=0.0)),
]


@pytest.mark.parametrize("policy", EXAMPLES)
def test_round_trip(policy):
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert again.digest == policy.digest


def test_digest_is_equal_in_another_process():
    program = (
        "import sys, json; from autocompress.policy import Policy\nfor text in json.load(sys.stdin): print(Policy.from_json(text).digest)"
    )
    texts = json.dumps([policy.to_json() for policy in EXAMPLES])
    environment = {"PYTHONHASHSEED": "7", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], input=texts, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [policy.digest for policy in EXAMPLES]


def test_digests_tell_policies_apart():
    assert len({policy.digest for policy in EXAMPLES}) == len(EXAMPLES)


def test_order_and_spelling_do_not_change_the_digest():
    one = Policy(student=StudentSpec(widths={"a": 1, "b": 2}, drop=("x", "y", "x")), quant=QuantSpec(layers={"p": 8, "q": 4}))
    other = Policy(student=StudentSpec(widths={"b": 2.0, "a": 1.0}, drop=("y", "x")), quant=QuantSpec(layers={"q": 4, "p": 8}))
    assert one == other
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"schema": 2}, "schema"),
        ({"prune": {"ratio": {}}}, "prune.ratio"),
        ({"extra": 1}, "extra"),
        ({"quant": {"bits": 1}}, "quant.bits"),
        ({"quant": {"layers": {"head": 9}}}, "9"),
        ({"prune": {"ratios": {"a": 1.0}}}, "prune.ratios.a"),
        ({"student": {"width": 0}}, "student.width"),
        ({"distill": {"alpha": 1.5}}, "distill.alpha"),
        ([], "document"),
    ],
)
def test_bad_content_is_refused_by_name(content, named):
    with pytest.raises(UsageError, match=named):
        Policy.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", '{"distill": {"temperature": NaN}}', b"\xff\xfe"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(UsageError):
        Policy.from_json(text)


@pytest.mark.parametrize("bits", sorted(set(range(-1, 40)) - set(KERNEL_BITS + STORAGE_BITS)))
def test_bits_without_a_meaning_are_refused(bits):
    for arguments in ({"bits": bits}, {"layers": {"a": bits}}):
        with pytest.raises(ValidationError):
            QuantSpec(**arguments)


def test_frozen_and_defaults_are_not_shared():
    policy = Policy()
    with pytest.raises(ValidationError):
        policy.quant = QuantSpec(bits=8)
    policy.prune.ratios["a"] = 0.5
    assert Policy().prune.ratios == {}


def test_bits_of_a_layer():
    quant = QuantSpec(bits=8, layers={"head": 32})
    assert (quant.of("head"), quant.of("anything")) == (32, 8)


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 16), st.floats(0.05, 8), st.floats(0, 0.99))
def test_channels_are_the_nearest_multiple(size, multiple, width, ratio):
    policy = Policy(student=StudentSpec(widths={"g": width}, multiple=multiple), prune=PruneSpec(ratios={"g": ratio}))
    channels, step = policy.channels("g", size), min(multiple, size)
    wanted = size * width * (1 - ratio)
    assert channels >= step
    assert (channels - size) * (wanted - size) >= 0, "rounding makes no narrower group wider, and no wider one narrower"
    assert channels == size or channels % step == 0
    assert channels in (step, size) or abs(channels - wanted) <= step / 2 + 1e-6


@pytest.mark.parametrize("multiple", [1, 8, 100])
def test_an_untouched_group_keeps_its_size(multiple):
    student = StudentSpec(width=0.5, widths={"g": 2.0}, multiple=multiple)
    assert Policy(student=student).channels("g", 13) == 13
    other = StudentSpec(multiple=multiple)
    assert Policy(student=other, prune=PruneSpec(ratios={"other": 0.5})).channels("g", 13) == 13


def test_words_name_what_changed():
    assert Policy().in_words() == "float32; T=4, alpha=0.9, features=0.8"
    words = Policy(
        student=StudentSpec(width=0.5, drop=("a", "b")),
        prune=PruneSpec(ratios={"g": 0.5, "h": 0.0}),
        quant=QuantSpec(bits=8, layers={"l": 32}),
    ).in_words()
    changed = "2 blocks dropped; width 0.50; 1 group pruned by 50 % on average; int8 (1 layer float32)"
    assert words == f"{changed}; T=4, alpha=0.9, features=0.8"
