"""Which networks can be traced, pruned, and are the same function afterwards? One network of each family, one row each.

    .venv/bin/pip install -q -e ".[dev,timm]" transformers
    .venv/bin/python benchmarks/any_model.py [NAME ...] [--export]

Weights are random and nothing is downloaded. Each network is handled in a process of its own, on one thread, with at most MEMORY bytes and
PATIENCE_S seconds. Columns: seconds of tracing, memory at its peak, operators; layers; channel groups, and how many can change; droppable
blocks; share of the convolutions' and linear layers' parameters that pruning can reach; share of all that a policy drawn at random leaves
(some seven of ten channel groups are pruned); and the laws, for this policy:

1. the student is the network of which nobody reads a removed channel: layers see zeros, norms and means take the rest (largest relative
   difference);
2. its workload is that which was predicted (yes or no);
3. the exported file answers as the student (largest relative difference; with `--export`); and where widths, depth, ratios and bits are
   drawn from the default search space, as `autocompress apply --policy random:SEED` does: signal to noise, in decibels, of a file that is
   partly int8 against its student, on inputs that its ranges were not fitted to; beside it what rounding does to the student itself:
   random weights let some networks make much of little differences.

Writes benchmarks/results/any_model.{json,md}, with the commit that each row is of; without names, what has no row yet is added. Exit code 1
when a network fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "any_model.json"
MEMORY = 12 * 2**30
PATIENCE_S = 600
CLASSES = 10
CALIBRATED, MOST_DRAWN = 8, 8

TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2",
    "segmentation:lraspp_mobilenet_v3_large", "segmentation:deeplabv3_mobilenet_v3_large", "segmentation:fcn_resnet50",
    "video:r3d_18",
)  # fmt: skip
TIMM = (
    "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224", "convit_tiny",
    "convmixer_768_32", "convnext_atto", "crossvit_tiny_240", "cs3darknet_s", "davit_tiny", "deit_tiny_patch16_224", "densenet121",
    "dla34", "dm_nfnet_f0", "dpn68", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0",
    "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8",
    "fbnetc_100", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_100", "gmixer_12_224", "hardcorenas_a", "hgnetv2_b0",
    "hiera_tiny_224", "hrnet_w18_small", "inception_next_atto", "inception_v4", "lcnet_050", "legacy_seresnet18", "levit_128s",
    "mambaout_femto", "maxvit_nano_rw_256", "mixer_s32_224", "mixnet_s", "mobilenetv2_050", "mobilenetv3_small_050",
    "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "mvitv2_tiny", "nasnetalarge", "nest_tiny", "nextvit_small",
    "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "regnety_002", "repghostnet_050",
    "repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet18", "resnetv2_50", "rexnet_100",
    "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11_bn",
    "visformer_tiny", "vit_relpos_small_patch16_224", "vit_tiny_patch16_224", "volo_d1_224", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip
HUGGING_FACE = ("bert", "distilbert", "roberta", "vit", "whisper_encoder", "gpt2", "llama")
OWN = ("mlp", "lstm", "gru", "keyword_spotter", "unet")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="of the networks; without, all that have no result yet")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--at-once", type=int, default=1, help="processes; times are of one only where there is one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(report_on(given.one, export=given.export)))
        return 0
    known = {row["name"]: row for row in json.loads(KEPT.read_text())["rows"]} if KEPT.exists() else {}
    names = given.names or [name for name in everything() if name not in known]
    with ThreadPoolExecutor(given.at_once) as pool:
        for row in pool.map(lambda name: in_a_child(name, export=given.export), names):
            known[row["name"]] = row
            write([known[name] for name in everything() if name in known])
    return int(any(row.get("error") for row in known.values()))


def everything() -> list[str]:
    return [
        *(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM),
        *(f"transformers:{name}" for name in HUGGING_FACE), *(f"own:{name}" for name in OWN),
    ]  # fmt: skip


def commit() -> str:
    """With a mark where anything but results differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(RESULTS.parent.parent), *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def in_a_child(name: str, *, export: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, *(["--export"] if export else [])]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 8 * 2**30, MEMORY + 8 * 2**30))  # torch maps much more than it uses

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, preexec_fn=limit, check=False)
        lines = done.stdout.strip().splitlines()
        failed = (done.stderr.strip().splitlines() or ["killed"])[-1]
        row = json.loads(lines[-1]) if done.returncode == 0 and lines else {"name": name, "error": failed[:300]}
    except subprocess.TimeoutExpired:
        row = {"name": name, "error": f"not done after {PATIENCE_S} s"}
    print(in_words(row), flush=True)
    return {**row, "commit": commit()}


# -- one network ------------------------------------------------------------------------------------------------------------------


def report_on(name: str, *, export: bool) -> dict[str, Any]:
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = network(name)
    from autocompress.graph import Graph
    from autocompress.policy import Policy

    begun = time.perf_counter()
    graph = Graph.trace(model, (example,))
    row: dict[str, Any] = {
        "name": name, "trace_s": time.perf_counter() - begun, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "operators": len(graph.module.graph.nodes), "layers": len(graph.layers), "groups": len(graph.groups),
        "prunable": sum(group.prunable for group in graph.groups), "blocks": len(graph.blocks), "reached": reached(graph),
        "opaque": graph.opaque_reason, "why": sorted({group.reason for group in graph.groups if not group.prunable}),
    }  # fmt: skip
    policy = random_policy(graph, 0)
    row["law1"] = law1(graph, policy, example)
    from autocompress.compress.student import build_student

    student = build_student(graph, policy)
    row["left"] = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in graph.module.parameters())
    again = Graph.trace(student, (example,))
    row["law2"] = [o.signature for o in again.workload(Policy()).operators] == [o.signature for o in graph.workload(policy).operators]
    if export:
        row["law3"] = law3(student, example)
        row |= law3_mixed(graph, example)
    return row


def random_policy(graph: Any, seed: int) -> Any:
    import random

    from autocompress.policy import Policy, PruneSpec

    draw = random.Random(seed)
    groups = [group.name for group in graph.groups if group.prunable]
    ratios = {name: draw.uniform(0.2, 0.7) for name in groups if draw.random() < 0.7}
    return Policy(prune=PruneSpec(ratios=ratios or dict.fromkeys(groups[:1], 0.5)))


def reached(graph: Any) -> float:
    """Share of the layers' parameters that lie between channels of which some can be removed."""
    free = {layer for group in graph.groups if group.prunable for layer in (*group.producers, *group.consumers)}
    total = sum(layer.params for layer in graph.layers)
    return sum(layer.params for layer in graph.layers if layer.name in free) / max(1, total)


@torch.no_grad()
def law1(graph: Any, policy: Any, example: Tensor) -> float:
    """Largest difference between the student and the network of which nobody reads a removed channel, relative to its outputs."""
    from autocompress.compress.student import build_student
    from autocompress.testing.reference import Unread

    expected = first_tensor(Unread(graph, policy).run(example.clone()))
    found = first_tensor(build_student(graph, policy)(example.clone()))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@torch.no_grad()
def law3(student: nn.Module, example: Tensor) -> float:
    from autocompress.export import onnx_bytes
    from autocompress.policy import QuantSpec

    found = answers(onnx_bytes(student, QuantSpec(), (example,)), [example])
    expected = first_tensor(student(example.clone()))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@torch.no_grad()
def law3_mixed(graph: Any, example: Tensor) -> dict[str, float | None]:
    """Decibels of a file against its student, and of the student against itself in float32; for a policy that is partly in int8."""
    import numpy as np

    from autocompress.compress.quantize import calibrate, fake_quantize, snap_biases
    from autocompress.compress.student import build_student
    from autocompress.devices import DeviceProfile, processor
    from autocompress.errors import PolicyFailure
    from autocompress.export import onnx_bytes
    from autocompress.search_space import find_suggest
    from autocompress.suggesters import LevelSuggester

    profile = DeviceProfile(runtime="onnxruntime", channel_multiple=8, reduced_range=processor.int8_saturates(processor.flags()))
    suggest = find_suggest("default", graph, profile)
    drawn = (suggest(LevelSuggester(np.random.default_rng(seed))) for seed in range(MOST_DRAWN))
    policy = next((policy for policy in drawn if policy.quant.rounds), None)
    if policy is None:
        return {"law3_mixed_db": None}
    inputs = [like(example) for _ in range(2 * CALIBRATED)]
    floats = build_student(graph, policy)
    student = fake_quantize(floats, policy.quant)
    try:
        calibrate(student, inputs[:CALIBRATED])
    except PolicyFailure:  # random weights may overflow
        return {"law3_mixed_db": None}
    student = snap_biases(student)
    found = answers(onnx_bytes(student, policy.quant, (example,)), inputs[CALIBRATED:])
    wanted, unrounded = (torch.cat([first_tensor(net(x.clone())) for x in inputs[CALIBRATED:]]) for net in (student, floats))
    return {"law3_mixed_db": decibels(found, wanted), "rounding_db": decibels(wanted, unrounded)}


def decibels(found: Tensor, wanted: Tensor) -> float:
    noise = (found - wanted).square().mean() / wanted.square().mean()
    return float(-10 * noise.clamp_min(1e-16).log10())


def like(example: Tensor) -> Tensor:
    """Another input at random."""
    return torch.randn_like(example) if example.is_floating_point() else torch.randint_like(example, 0, 100)


def answers(payload: bytes, inputs: list[Tensor]) -> Tensor:
    """What a file makes of these, one after the other."""
    import onnxruntime

    session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in inputs])


def first_tensor(outputs: Any) -> Tensor:
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs


# -- networks ---------------------------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[nn.Module, Tensor]:
    origin, _, own = name.partition(":")
    model, example = {"torchvision": torchvision_network, "timm": timm_network, "transformers": transformer, "own": own_network}[origin](
        own
    )
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            nn.init.normal_(norm.running_mean, 0.0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    for parameter in model.parameters():  # of zeros, as the last layers of branches often are, nobody would miss any
        if parameter.detach().abs().max() < 1e-3:
            nn.init.normal_(parameter, 0.0, 0.1)
    return model.eval(), example


def torchvision_network(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    kind, _, own = name.rpartition(":")
    if kind == "segmentation":
        return torchvision.models.get_model(own, weights=None, weights_backbone=None, num_classes=CLASSES), torch.randn(1, 3, 224, 224)
    if kind == "video":
        return torchvision.models.get_model(own, weights=None, num_classes=CLASSES), torch.randn(1, 3, 4, 56, 56)
    options = {"init_weights": False} if own in ("googlenet", "inception_v3") else {}
    size = 299 if own == "inception_v3" else 224
    return torchvision.models.get_model(own, weights=None, num_classes=CLASSES, **options), torch.randn(1, 3, size, size)


def timm_network(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return model, torch.randn(1, *model.default_cfg["input_size"])


class Wrapped(nn.Module):
    """A network of transformers that is called with one tensor, and answers with one."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def transformer(name: str) -> tuple[nn.Module, Tensor]:
    import transformers as hf

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    tokens = torch.randint(0, 100, (1, 16))
    if name == "distilbert":
        model = hf.DistilBertModel(hf.DistilBertConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128))
    elif name == "vit":
        images = torch.randn(1, 3, 32, 32)
        return Wrapped(
            hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **small)), lambda m, x: m(pixel_values=x).last_hidden_state
        ), images
    elif name == "whisper_encoder":
        config = hf.WhisperConfig(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, max_source_positions=50)
        encoder = hf.models.whisper.modeling_whisper.WhisperEncoder(config)
        return Wrapped(encoder, lambda m, x: m(x).last_hidden_state), torch.randn(1, config.num_mel_bins, 100)
    elif name == "gpt2":
        model = hf.GPT2Model(hf.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4))
    elif name == "llama":
        model = hf.LlamaModel(hf.LlamaConfig(vocab_size=100, num_key_value_heads=2, **small))
    else:
        config, kind = {"bert": (hf.BertConfig, hf.BertModel), "roberta": (hf.RobertaConfig, hf.RobertaModel)}[name]
        model = kind(config(vocab_size=100, **small))
    plain = {"use_cache": False} if name in ("gpt2", "llama") else {}
    return Wrapped(model, lambda m, x: m(input_ids=x, **plain).last_hidden_state), tokens


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], *, convolves: bool = False) -> None:
        super().__init__()
        self.front = nn.Conv1d(20, 24, 3, padding=1) if convolves else nn.Identity()
        self.recurrent, self.head = kind(24 if convolves else 20, 32, num_layers=2, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(torch.relu(self.front(x)).transpose(1, 2))[0][:, -1])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = block(3, 16), block(16, 32), block(32, 64)
        self.up2, self.join2, self.up1, self.join1 = (
            nn.ConvTranspose2d(64, 32, 2, 2),
            block(64, 32),
            nn.Upsample(scale_factor=2),
            block(48, 16),
        )
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        x = self.join2(torch.cat([self.up2(self.middle(nn.functional.max_pool2d(second, 2))), second], 1))
        return self.head(self.join1(torch.cat([self.up1(x), first], 1)))


def block(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


def own_network(name: str) -> tuple[nn.Module, Tensor]:
    if name == "mlp":
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)), torch.randn(1, 20)
    if name == "unet":
        return UNet(), torch.randn(1, 3, 64, 64)
    return Recurrent(nn.GRU if name == "gru" else nn.LSTM, convolves=name == "keyword_spotter"), torch.randn(1, 20, 16)


# -- the table --------------------------------------------------------------------------------------------------------------------


def in_words(row: dict[str, Any]) -> str:
    if row.get("error"):
        return f"| {row['name']} | **{row['error']}** | | | | | | | | | |"
    laws = [f"{row['law1']:.0e}", "yes" if row["law2"] else "**no**", f"{row['law3']:.0e}" if "law3" in row else ""]
    mixed = row.get("law3_mixed_db")
    rounding = f" ({row['rounding_db']:.0f})" if "rounding_db" in row else ""
    laws.append(f"{mixed:.0f} dB{rounding}" if mixed is not None else "none" if "law3_mixed_db" in row else "")
    groups = "cannot be traced" if row["opaque"] else f"{row['prunable']} of {row['groups']}"
    cost = f"{row['trace_s']:.1f} | {row['peak_gb']:.1f} | {row['operators']}"
    size = f"{row['reached']:.1%} | {row['left']:.0%}"
    return f"| {row['name']} | {cost} | {row['layers']} | {groups} | {row['blocks']} | {size} | {' | '.join(laws)} |"


def write(rows: list[dict[str, Any]]) -> None:
    """After each network, so that an interrupted run goes on with the next one."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    KEPT.write_text(json.dumps({"when": when, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    columns = "network | trace, s | GB | operators | layers | groups | blocks | reached | left | law 1 | law 2 | law 3 | mixed bits"
    head = f"| {columns} |\n" + "|---" * 13 + "|\n"
    (RESULTS / "any_model.md").write_text(head + "\n".join(map(in_words, rows)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
