from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from autocompress.errors import UsageError
from autocompress.models import load_model
from autocompress.models.libraries import LIBRARIES
from autocompress.references import MODEL_LIBRARIES


def test_models_come_in_eval_mode_with_the_classes_of_the_data():
    model = load_model("torchvision:mobilenet_v3_small", classes=7)
    assert not model.training
    assert model.classifier[-1].out_features == 7


def test_a_function_makes_a_model(tmp_path):
    (tmp_path / "own.py").write_text("from torch import nn\ndef f(): return nn.Linear(4, 3)\ndef g(): return 3")
    weights = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, weights)
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


@pytest.fixture(scope="module")
def hugging_face():
    return pytest.importorskip("transformers", reason="transformers is not installed")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def bert(hugging_face, tmp_path):
    """(a folder that a classifier of three kinds of texts was saved in, the classifier)."""
    model = hugging_face.BertForSequenceClassification(hugging_face.BertConfig(vocab_size=50, num_labels=3, **SMALL)).eval()
    model.save_pretrained(tmp_path / "my-bert")
    return tmp_path / "my-bert", model


def test_a_folder_of_transformers_is_loaded_with_its_weights_and_nothing_is_printed(bert, capfd):
    folder, saved = bert
    model, tokens = load_model(f"transformers:{folder}", classes=3), torch.arange(12).reshape(2, 6)
    assert type(model) is type(saved)
    assert torch.equal(model(tokens).logits, saved(tokens).logits)
    assert not model.training
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_transformers_and_other_weights(bert, tmp_path):
    folder, saved = bert
    state = {name: value + 1 for name, value in saved.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model(f"transformers:{folder}", weights=tmp_path / "w.safetensors", classes=3)
    assert torch.equal(model.classifier.weight, saved.classifier.weight + 1)


def test_half_precision_becomes_float32(bert, tmp_path):
    folder, saved = bert
    saved.half().save_pretrained(folder)
    model = load_model(f"transformers:{folder}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.classifier.weight, saved.classifier.weight.float())


def test_a_vision_model_of_transformers_knows_how_its_images_were_normalised(hugging_face, tmp_path):
    config = hugging_face.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SMALL)
    hugging_face.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert load_model(f"transformers:{tmp_path}", classes=5).pretrained_cfg is None
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "do_normalize": true, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    )
    assert load_model(f"transformers:{tmp_path}", classes=5).pretrained_cfg == {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}


def test_weights_of_transformers_that_are_for_something_else(bert, hugging_face, tmp_path):
    folder, saved = bert
    with pytest.raises(UsageError, match="tell 3 classes apart, but the data has 4"):
        load_model(f"transformers:{folder}", classes=4)
    saved.bert.save_pretrained(tmp_path / "trunk")  # without a head
    config = tmp_path / "trunk" / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSequenceClassification"'))
    with pytest.raises(UsageError, match=r"lack 'classifier\.bias' and 1 more") as caught:
        load_model(f"transformers:{tmp_path / 'trunk'}")
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("transformers:/no/such/folder", "does not exist", "save_pretrained"),
        ("transformers:./my-bert", "does not exist", "save_pretrained"),
        ("transformers:", "does not exist", "save_pretrained"),
        ("transformers:x/y?pretrained=true", "takes the option revision", "revision=COMMIT"),
    ],
)
def test_references_that_name_no_model_of_transformers(hugging_face, reference, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        load_model(reference)
    assert hint in caught.value.hint


@pytest.mark.parametrize("change", ["cut", "config", "remote"])
def test_a_damaged_folder_of_transformers_and_one_with_code_of_its_own(bert, change):
    folder, _ = bert
    config, weights = folder / "config.json", folder / "model.safetensors"
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "config":
        config.write_text("{")
    else:
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
        config.write_text('{"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(f"transformers:{folder}")
    assert not (folder / "ran").exists()


def test_what_is_no_code_of_the_users_is_what_a_library_builds():
    assert tuple(LIBRARIES) == MODEL_LIBRARIES
