"""The networks and images of AUTOCOMPRESS_DATA: what random weights cannot tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.train import train_quantized
from autocompress.data import Data
from autocompress.data.sources import load_data
from autocompress.devices import processor
from autocompress.export import Provenance, write_bundle
from autocompress.graph import Graph
from autocompress.models import load_model
from autocompress.policy import Policy, QuantSpec
from autocompress.testing.devices import FakeDevice
from autocompress.trial.evaluate import run_artifact, score_outputs

pytestmark = pytest.mark.data
REPOSITORY = Path(__file__).parents[2]
IMAGES = 1000


@pytest.fixture(scope="module")
def cifar(data_sets: Path) -> Data:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_DATA", str(data_sets))
        return load_data(f"{REPOSITORY / 'benchmarks' / 'cifar10.py'}:data")


def pretrained(data_sets: Path, name: str) -> Graph:
    weights = data_sets / "cifar10_resnets" / f"{name}.safetensors"
    model = load_model(f"{REPOSITORY / 'benchmarks' / 'cifar10.py'}:{name}", weights=weights)
    return Graph.trace(model, (torch.zeros(1, 3, 32, 32),))


def test_zero_padded_shortcuts_leave_every_stream_and_block_searchable(data_sets: Path) -> None:
    resnet56 = pretrained(data_sets, "resnet56")
    streams = [group.size for group in resnet56.groups if group.stream and group.prunable]
    assert streams == [16, 16, 32]  # the channels that each stage adds to those before it
    assert len(resnet56.blocks) == 9 + 8 + 8
    assert [frozen.name for frozen in resnet56.frozen] == ["linear"]


def test_int8_without_training_keeps_the_accuracy_of_resnet20(data_sets: Path, cifar: Data, tmp_path: Path) -> None:
    resnet20 = pretrained(data_sets, "resnet20")
    test = cifar.test[slice(0, IMAGES)]
    scores = {}
    for bits in (32, 8):
        policy = Policy(quant=QuantSpec(bits=bits, reduced_range=processor.int8_saturates(processor.flags())))
        student = train_quantized(build_student(resnet20, Policy()), policy.quant, cifar, TrainPlan(steps=0))
        manifest = write_bundle(tmp_path / str(bits), student, policy, cifar.example(1), Provenance(model="resnet20"))
        outputs = run_artifact(FakeDevice(), tmp_path / str(bits) / manifest.artifact, cifar, test, 1)
        scores[bits] = score_outputs(outputs, test.targets, cifar).value
    assert scores[32] > 0.90
    assert scores[8] > scores[32] - 0.01


def test_torchvision_reads_what_the_unpacking_script_writes(data_sets: Path, cifar: Data, tmp_path: Path) -> None:
    import subprocess

    subprocess.run([sys.executable, str(data_sets / "unpack.py"), str(tmp_path)], check=True)
    other = load_data(f"torchvision:CIFAR10?root={tmp_path}")
    assert len(other.train) == len(cifar.train) + len(cifar.val)
    assert len(other.val) == len(other.test) == len(cifar.test) // 2
    both = torch.cat([other.val.targets, other.test.targets])
    assert torch.equal(both.bincount(), cifar.test.targets.bincount())
    assert (other.train.inputs[:64].flatten(1)[:, None] == cifar.train.inputs[:9].flatten(1)[None]).all(2).any(0).all(), "as they were"
