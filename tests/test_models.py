from __future__ import annotations

import copy
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn

from autocompress.batch import Batch
from autocompress.errors import UsageError
from autocompress.export import weights_bytes
from autocompress.graph import Graph
from autocompress.models import example_for, load_model, load_tensor_state, load_weights, read_state, simplify_call, tensor_state


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


def test_models_come_in_eval_mode_with_the_classes_of_the_data():
    model = load_model("torchvision:mobilenet_v3_small", classes=7)
    assert not model.training
    assert model.classifier[-1].out_features == 7


def test_a_function_makes_a_model(tmp_path):
    (tmp_path / "own.py").write_text("from torch import nn\ndef f(): return nn.Linear(4, 3)\ndef g(): return 3")
    weights = write(tmp_path / "w.safetensors", {"weight": torch.ones(3, 4), "bias": torch.ones(3)})
    assert torch.equal(load_model(f"{tmp_path}/own.py:f", weights=weights).weight, torch.ones(3, 4))
    with pytest.raises(UsageError, match=r"must return a torch\.nn\.Module, but got int"):
        load_model(f"{tmp_path}/own.py:g")


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("torchvision:resnet19", "unknown model", "resnet18"),
        ("torchvision:", "unknown model", "known"),
        ("resnet18", "unknown model", "torchvision:NAME"),
        ("resnet18?x=1", "unknown model", "torchvision:NAME"),
        ("torchvision:resnet18?x=1", "takes the option pretrained", "pretrained=true"),
        ("timm:resnet18?pretrained=yes", "takes the option pretrained", "pretrained=true"),
        ("net.py:build?pretrained=true", "takes no options", "function"),
        ("timm:resnet19", "timm", ""),
        ("no_such_module:f", "does not import", "file.py"),
    ],
)
def test_references_that_name_no_model(reference, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        load_model(reference)
    assert hint in caught.value.hint


@pytest.fixture
def published(monkeypatch):
    """torchvision, whose weights come from a hub that is here."""
    from torchvision import models

    asked, build = [], models.get_model

    def get_model(name, weights=None, **options):
        asked.append((name, weights))
        return build(name, weights=None, **options)

    monkeypatch.setattr(models, "get_model", get_model)
    return asked


@pytest.mark.parametrize("classes", [None, 1000])
def test_published_weights_are_those_that_the_library_recommends(published, classes):
    model = load_model("torchvision:resnet18?pretrained=true", classes=classes)
    assert published == [("resnet18", "DEFAULT")]
    assert model.fc.out_features == 1000
    load_model("torchvision:resnet18?pretrained=false", classes=7)
    assert published[1:] == [("resnet18", None)]


def test_published_weights_know_their_own_classes_and_leave_no_room_for_a_file(published, tmp_path):
    with pytest.raises(UsageError, match="tell 1000 classes apart, but the data has 7") as caught:
        load_model("torchvision:resnet18?pretrained=true", classes=7)
    assert "--weights" in caught.value.hint
    with pytest.raises(UsageError, match="either published weights or those of a file"):
        load_model("torchvision:resnet18?pretrained=true", weights=tmp_path / "w.safetensors")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def get_model(name, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    with pytest.raises(UsageError, match=r"cannot be loaded: .*Name or service not known") as caught:
        load_model("torchvision:resnet18?pretrained=true")
    assert "--weights" in caught.value.hint


class Answers(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.head, self.aux, self.outputs = nn.Linear(4, 3), nn.Linear(4, 2), outputs

    def forward(self, x):
        return self.outputs(self.head(x), self.aux(x))


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        (lambda y, a: {"loss": a.mean(), "logits": y}, "logits"),
        (lambda y, a: OrderedDict(out=y, aux=a), "out"),
        (lambda y, a: {"last_hidden_state": y, "pooler_output": a}, "last_hidden_state"),
        (lambda y, a: {"mine": y}, "mine"),
    ],
)
def test_of_several_outputs_by_name_the_main_one_is_taken(outputs, name):
    model, x = Answers(outputs).eval(), torch.randn(2, 4)
    names = set(model.state_dict())
    assert simplify_call(model, x) == name
    assert torch.equal(model(x), model.head(x))
    graph = Graph.trace(model, (x,))
    assert [layer.name for layer in graph.layers] == ["head"]
    with torch.no_grad():
        assert torch.equal(graph.module(x), model.head(x))
    assert set(model.state_dict()) == names, "weights have the names that they had"


@pytest.mark.parametrize("outputs", [lambda y, a: y, lambda y, a: {"boxes": y, "kinds": a}, lambda y, a: (y, a), lambda y, a: {"mine": 1}])
def test_outputs_of_which_none_is_known_to_be_the_main_one_stay(outputs):
    model = Answers(outputs).eval()
    assert simplify_call(model, torch.randn(2, 4)) == ""
    assert not model._forward_hooks
    assert simplify_call(model, torch.randn(2, 5)) == "", "what does not run is told by who runs it"


@pytest.mark.parametrize(
    ("written", "shape", "dtype"),
    [("4", (2, 4), torch.float32), ("3x8x9", (2, 3, 8, 9), torch.float32), ("128:int64", (2, 128), torch.int64)],
)
def test_an_input_is_written_as_sizes_and_a_type(written, shape, dtype):
    example = example_for(net(), "own", 2, written)
    assert (tuple(example.shape), example.dtype) == (shape, dtype)


@pytest.mark.parametrize(("written", "names"), [("4:float32,3x8:bool", ()), ("ids=4, mask=3x8:bool", ("ids", "mask"))])
def test_several_inputs_are_separated_by_commas(written, names):
    example = example_for(net(), "own", 2, written)
    assert example.names == names
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in example.tensors] == [((2, 4), torch.float32), ((2, 3, 8), torch.bool)]


def test_one_input_may_have_a_name():
    assert example_for(net(), "own", 2, "pixels=4").names == ("pixels",)


class Keywords(nn.Module):
    """Takes whatever is named."""

    def forward(self, **named):
        return named["a"] - named["b"]


def test_inputs_go_to_the_arguments_of_their_names():
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    model = Keywords()
    assert simplify_call(model, Batch((b, a), ("b", "a"))) == ""
    assert torch.equal(model(b, a), a - b)
    assert torch.equal(copy.deepcopy(model)(b, a), a - b)
    graph = Graph.trace(model, (b, a))
    assert not graph.opaque_reason
    assert torch.equal(graph.module(b, a), a - b)


def test_a_model_that_is_given_again_takes_other_names():
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    model = Keywords()
    for names, tensors in ((("a", "b"), (a, b)), (("b", "a"), (b, a))):
        simplify_call(model, Batch(tensors, names))
        assert torch.equal(model(*tensors), a - b)


@pytest.mark.parametrize(("model", "name"), [(net(), "c"), (net(), "not a name"), (Keywords(), "class")])
def test_inputs_of_no_argument_are_refused(model, name):
    with pytest.raises(UsageError, match=f"has no '{name}'") as error:
        simplify_call(model, Batch((torch.rand(1, 4),), (name,)))
    assert "its arguments are" in error.value.hint


def test_inputs_of_a_traced_module_have_no_names():
    with pytest.raises(UsageError, match="have no names"):
        simplify_call(fx.symbolic_trace(net()), Batch((torch.rand(1, 4),), ("input",)))


@pytest.mark.parametrize("written", ["", "3,", "3,4", "3x", "0x3", "4:text", "-1x3", "3x4:", "x", "=3", "a b=3"])
def test_an_input_that_is_written_otherwise_is_refused(written):
    with pytest.raises(UsageError, match="an input is written as its sizes"):
        example_for(net(), "own", 1, written)


def test_a_model_may_answer_otherwise_in_training():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x) if self.training else {"out": self.head(x)}

    model, x = Both().eval(), torch.randn(2, 4)
    assert simplify_call(model, x) == "out"
    assert torch.equal(model.train()(x), model.eval()(x))
