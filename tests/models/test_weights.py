from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.errors import UsageError
from autocompress.export import weights_bytes
from autocompress.models import load_tensor_state, load_weights, read_state, tensor_state


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def state(**changes):
    return {key: value + 1 for key, value in net().state_dict().items()} | changes


def write(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_are_loaded(tmp_path, suffix):
    model = net()
    load_weights(model, write(tmp_path / f"w ü{suffix}", state()))
    assert torch.equal(model[0].weight, net()[0].weight + 1)


def test_a_checkpoint_may_hold_the_state_dict(tmp_path):
    assert set(read_state(write(tmp_path / "c.pt", {"epoch": 3, "state_dict": state()}))) == set(state())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.backbone."])
def test_a_checkpoint_of_a_training_script_is_read(tmp_path, key, prefix):
    """Of data parallelism, `torch.compile` and Lightning too, which name all weights otherwise."""
    model = net()
    load_weights(model, write(tmp_path / "c.pt", {"epoch": 3, key: {prefix + name: value for name, value in state().items()}}))
    assert torch.equal(model[0].weight, net()[0].weight + 1)


def test_what_a_checkpoint_holds_beside_the_network_is_left_out(tmp_path):
    model = net()
    wrapped = {f"model.{name}": value for name, value in state().items()} | {"criterion.weight": torch.ones(3)}
    load_weights(model, write(tmp_path / "c.ckpt", {"state_dict": wrapped, "hyper_parameters": {"lr": 0.1}}))
    assert torch.equal(model[0].weight, net()[0].weight + 1)
    del wrapped["model.0.weight"]
    with pytest.raises(UsageError, match="do not fit the model"):
        load_weights(model, write(tmp_path / "c.ckpt", {"state_dict": wrapped}))


def test_a_checkpoint_of_what_a_model_wraps_is_read(tmp_path):
    model = nn.Sequential(OrderedDict(bert=net()))
    load_weights(model, write(tmp_path / "w.safetensors", state()))
    assert torch.equal(model.bert[0].weight, net()[0].weight + 1)
    model.head = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="do not fit the model"):
        load_weights(model, write(tmp_path / "w.safetensors", state()))


def test_a_wrapped_checkpoint_may_name_once_what_several_parts_share(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    saved = {f"module.{name}": value + 1 for name, value in model.state_dict().items() if name != "1.weight"}
    load_weights(model, write(tmp_path / "w.safetensors", saved))
    assert torch.equal(model[1].weight, saved["module.0.weight"])


def test_what_a_file_holds_beside_tensors_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"holds more than tensors \(pathlib.*Path"):
        read_state(write(tmp_path / "c.ckpt", {"state_dict": state(), "hyper_parameters": {"folder": Path("x")}}))


class Remembering(nn.Linear):
    """Keeps something else than tensors in its state, as modules of vendors do."""

    def get_extra_state(self):
        return {"scale": 1.0}

    def set_extra_state(self, state):
        assert state == {"scale": 1.0}


def test_what_a_state_holds_beside_tensors_is_no_weight(tmp_path):
    model = nn.Sequential(Remembering(3, 2))
    (tmp_path / "w.safetensors").write_bytes(weights_bytes(model))
    other = nn.Sequential(Remembering(3, 2))
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)
    load_tensor_state(other, {name: value + 1 for name, value in tensor_state(model).items()})
    assert torch.equal(other[0].weight, model[0].weight + 1)
    with pytest.raises(RuntimeError, match="bias"):
        load_tensor_state(other, {"0.weight": model[0].weight})


def test_a_model_may_have_a_part_that_is_called_as_what_wraps_others(tmp_path):
    model = nn.Sequential(OrderedDict(module=net()))
    load_weights(model, write(tmp_path / "w.pt", {f"module.{name}": value for name, value in state().items()}))
    assert torch.equal(model.module[0].weight, net()[0].weight + 1)


def test_what_a_checkpoint_holds_is_told_where_it_is_no_state_dict(tmp_path):
    with pytest.raises(UsageError, match="with the keys 'epoch', 'weights'"):
        read_state(write(tmp_path / "c.pt", {"epoch": 3, "weights": state()}))


def test_weights_that_several_parts_share_are_named_once(tmp_path):
    """As `safetensors.torch.save_model` does."""

    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, saved = tied(), {name: value + 1 for name, value in tied().state_dict().items()}
    del saved["1.weight"]
    load_weights(model, write(tmp_path / "w.safetensors", saved))
    assert torch.equal(model[1].weight, saved["0.weight"])
    del saved["2.weight"]
    with pytest.raises(UsageError, match=r"lacks '2\.weight'"):
        load_weights(tied(), write(tmp_path / "w.safetensors", saved))


def test_the_counter_of_batch_norm_may_be_missing(tmp_path):
    content = {key: value for key, value in state().items() if "num_batches" not in key}
    load_weights(net(), write(tmp_path / "w.safetensors", content))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_refused(tmp_path, suffix, kept):
    path = write(tmp_path / f"w{suffix}", state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UsageError, match="cannot be read: it ends before its last tensor") as caught:
        load_weights(net(), path)
    assert path.name in caught.value.message
    assert "state dict" in caught.value.hint


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_pickled_code_is_never_executed(tmp_path, writer, nested):
    target, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"state_dict": {"0.weight": Payload(target)}} if nested else Payload(target)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
        assert any(code.name in ("REDUCE", "NEWOBJ") for code, _, _ in pickletools.genops(path.read_bytes()))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load_weights(net(), path)
    assert not target.exists()
    assert "file.py:function" in caught.value.hint


def test_a_whole_model_is_refused(tmp_path):
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_state(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (state(**{"0.weight": torch.zeros(3, 5)}), r"shape \(3, 4\), but got \(3, 5\)"),
        (state(**{"0.wieght": torch.zeros(1)}), "the file has '0.wieght'"),
        ({key: value for key, value in state().items() if key != "1.bias"}, "the file lacks '1.bias'"),
        ({}, "the file lacks"),
        ({1: torch.zeros(1)}, "state dict"),
        ({"a": 1}, "state dict"),
        ([torch.zeros(1)], "state dict"),
        (torch.zeros(1), "state dict"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(tmp_path, content, message):
    model = net()
    with pytest.raises(UsageError, match=message):
        load_weights(model, write(tmp_path / "w.pt", content))
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["absent.pt", "."])
def test_weights_that_are_no_file(tmp_path, name):
    with pytest.raises(UsageError, match="does not exist"):
        read_state(tmp_path / name)


def test_of_two_networks_in_one_checkpoint_it_must_be_said_which_is_meant(tmp_path):
    both = {f"student.{name}": value for name, value in state().items()} | {
        f"teacher.{name}": value for name, value in net().state_dict().items()
    }
    with pytest.raises(UsageError, match="'student', 'teacher' all fit the model, and differ"):
        load_weights(net(), write(tmp_path / "w.safetensors", both))
    same = {f"{prefix}.{name}": value.clone() for prefix in ("online", "target") for name, value in state().items()}
    model = net()
    load_weights(model, write(tmp_path / "w.safetensors", same))
    assert torch.equal(model[0].weight, net()[0].weight + 1)


def test_what_a_model_computes_itself_may_still_be_in_a_file(tmp_path):
    """As positions are in files of earlier versions of transformers, and counts in those of who has profiled a network."""
    model = net()
    model.register_buffer("positions", torch.arange(4), persistent=False)
    load_weights(model, write(tmp_path / "w.safetensors", state() | {"positions": torch.arange(4), "0.total_ops": torch.zeros(1)}))
    assert torch.equal(model[0].weight, net()[0].weight + 1)
    with pytest.raises(UsageError, match="the file has 'positions'"):
        load_weights(model, write(tmp_path / "w.safetensors", state() | {"positions": torch.arange(5)}))
