"""Networks and random policies for the laws. Everything is in eval mode, with batch norms that do something."""

from __future__ import annotations

import functools
import random
from typing import get_args

import torch
import torchvision
from torch import nn

from autocompress.graph import Graph
from autocompress.policy import Criterion, LowRankSpec, Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.testing.models import resnet20, tiny_resnet

CLASSES = 10
CRITERIA = get_args(Criterion)


def _vgg11_bn() -> nn.Module:
    """With a small head: the original's 120 million weights say nothing more."""
    model = torchvision.models.vgg11_bn(init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
    model.classifier = nn.Sequential(nn.Linear(512 * 4, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, CLASSES))
    return model


def _densenet() -> nn.Module:
    """Two blocks and a transition are what there is to understand: the sixty layers of densenet121 say the same again (test_families)."""
    return torchvision.models.DenseNet(growth_rate=16, block_config=(3, 4), num_init_features=32, num_classes=CLASSES)


def _mobilenet() -> nn.Module:
    """Version 3, with one block of each kind: with and without expansion, squeeze-excite, hard swish and a stride."""
    plain = ((16, 3, 16, 16, True, "RE", 2), (16, 3, 72, 24, False, "RE", 1))
    hard = ((24, 5, 96, 40, True, "HS", 2), (40, 5, 120, 40, True, "HS", 1))
    blocks = [torchvision.models.mobilenetv3.InvertedResidualConfig(*kind, 1, 1.0) for kind in (*plain, *hard)]
    return torchvision.models.MobileNetV3(blocks, last_channel=64, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    kinds = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2))
    blocks = [torchvision.models.efficientnet.MBConvConfig(*kind, 1.0, 1.0) for kind in kinds]
    return torchvision.models.EfficientNet(blocks, dropout=0.2, last_channel=128, num_classes=CLASSES)


def _resnext() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, groups=8, width_per_group=8)


def _resnet_with_group_norms() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, norm_layer=lambda n: nn.GroupNorm(8, n))


def _convnext() -> nn.Module:
    stages = [torchvision.models.convnext.CNBlockConfig(*stage) for stage in ((24, 48, 2), (48, None, 2))]
    return torchvision.models.ConvNeXt(stages, layer_scale=0.5, num_classes=CLASSES)


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=CLASSES
    )


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 24, [2, 1], [3, 6], [4, 4], num_classes=CLASSES)


class Gates(nn.Module):
    """Channels that are halved, cut, put together in another order and scaled by what the network holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.mix = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(12, 20, 1)
        self.act, self.scale = nn.PReLU(20), nn.Parameter(torch.rand(20, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(1, 20, 1, 1))
        self.last, self.head = nn.Conv2d(32, 10, 3), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.gate(torch.relu(self.stem(x))).chunk(2, dim=1)
        x = self.act(self.mix(value * torch.sigmoid(gate))) * self.scale + self.shift
        first, second = x.split([8, 12], dim=1)
        x = torch.cat([second, nn.functional.pad(first, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1], x[:, 4:16]], dim=1)
        return self.head(nn.functional.glu(self.last(x).mean((2, 3)), dim=1))


class Tokens(nn.Module):
    """Attention whose keys and values serve two heads each, written out, on embedded and summed tokens; then a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(3, 24, 4, stride=4), nn.Parameter(torch.randn(1, 16, 24) * 0.2)
        self.norm, self.q, self.kv = nn.LayerNorm(24), nn.Linear(24, 32), nn.Linear(24, 32)
        self.bias, self.out = nn.Parameter(torch.randn(4, 1, 1)), nn.Linear(32, 24)
        self.up, self.down, self.head = nn.Linear(24, 48, bias=False), nn.Linear(24, 24), nn.Linear(24, CLASSES)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, _ = x.shape
        q = self.q(x).view(n, tokens, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(n, tokens, 2, 2, 8).permute(2, 0, 3, 1, 4)
        k, v = k.repeat_interleave(2, dim=1), v[:, :, None].expand(n, 2, 2, tokens, 8).reshape(n, 4, tokens, 8)
        weights = (q @ k.transpose(-2, -1) * 8**-0.5 + self.bias).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        x = x + self.attend(self.norm(x))
        value, gate = torch.split(self.up(self.norm(x)), 24, dim=-1)
        return self.head((x + self.down(value * nn.functional.gelu(gate))).mean(1))


class Statistics(nn.Module):
    """Norms that are written out, and gates of what all channels have in common.

    The gate is that of CBAM (Woo et al. 2018, arXiv 1807.06521); attention by cosines, that of Swin V2 (Liu et al. 2021, arXiv
    2111.09883).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.whole = nn.Conv2d(3, 24, 4, stride=4), nn.Conv2d(2, 1, 3, padding=1), nn.GroupNorm(1, 24)
        self.scale, self.norm = nn.Parameter(torch.rand(24) + 0.5), nn.RMSNorm(24)
        self.qkv, self.out = nn.Linear(24, 96), nn.Linear(32, 24)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, CLASSES)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = (nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1) * 10).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.whole(self.embed(x)))
        x = x * torch.sigmoid(self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attend(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)
        return self.head((x + self.down(torch.relu(self.up(self.norm(x))))).mean(1))


class Windows(nn.Module):
    """Attention within windows, on tensors of five axes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Conv2d(3, 24, 2, stride=2), nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        x = self.embed(x).reshape(n, 24, 4, 16).permute(0, 2, 3, 1)
        q, k, v = self.qkv(x).reshape(n, 4, 16, 3, 3, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, 4, 16, 24))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean((1, 2)))


class Up(nn.Module):
    """Down and up again by a transposed convolution, beside what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join, self.norm, self.head = nn.Conv2d(11, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = self.up(torch.relu(self.deep(torch.relu(self.down(x)))))
        return self.head(torch.relu(self.norm(self.join(torch.cat([torch.relu(deep), x], dim=1)))).mean((2, 3)))


class Recurrent(nn.Module):
    """Columns of an image, read one after the other in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.recurrent = nn.Linear(48, 20), nn.LSTM(20, 12, 2, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(24, 512), nn.Linear(512, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = torch.relu(self.front(x.permute(0, 3, 1, 2).flatten(2)))
        return self.head(torch.relu(self.hidden(self.recurrent(columns)[0].mean(1))))


class Spread(nn.Module):
    """Channels that become space and come back, shuffled, stacked and repeated; filters of each channel by itself that nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.up, self.grouped = nn.ConvTranspose2d(12, 12, 2, 2, groups=12), nn.Conv2d(12, 12, 1, groups=3)
        self.register_buffer("blur", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])).expand(12, 1, 3, 3) / 16)
        self.wide, self.both, self.last = nn.Conv2d(12, 8, 1), nn.Conv3d(8, 10, (2, 1, 1)), nn.Conv2d(20, 16, 1)
        self.out, self.split, self.head = nn.Conv2d(64, 16, 1), nn.ConvTranspose2d(16, 12, 2, groups=2), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pixel_shuffle(torch.relu(self.stem(x)), 2)
        x = torch.relu(self.norm(self.mix(nn.functional.avg_pool2d(x, 2))))
        x = nn.functional.conv2d(torch.relu(self.up(x)), self.blur, stride=2, padding=1, groups=12)
        x = nn.functional.channel_shuffle(torch.relu(self.grouped(x)), 3)
        x = torch.relu(self.wide(x)).movedim(1, -1).movedim(-1, 1)
        x = torch.relu(self.both(torch.stack([x, x * (x > 0.1)], dim=2)).squeeze(2))
        x = torch.relu(self.last(x.swapaxes(2, 3).repeat(1, 2, 1, 1)))
        return self.head(torch.relu(self.split(torch.relu(self.out(nn.functional.pixel_unshuffle(x, 2))))).mean((2, 3)))


class Heads(nn.Module):
    """Attention whose keys and values serve two heads each, by the operator that knows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.kv, self.out = nn.Conv2d(3, 24, 4, stride=4), nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 24)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, tokens, _ = x.shape
        q = self.q(x).view(n, tokens, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(n, tokens, 2, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(n, tokens, -1))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


class Mixer(nn.Module):
    """Layers over tokens and over channels in turn (Tolstikhin et al. 2021, arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 24, 4, stride=4), nn.LayerNorm(24), nn.Linear(24, CLASSES)
        self.over_tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.over_channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.over_tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.over_channels(self.norm(x))).mean(1))


class Residual(nn.Module):
    """A block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Nested(nn.Module):
    """Blocks in a block, and a layer that is called twice, each time before a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 12, 3, padding=1), nn.Sequential(Residual(12), Residual(12))
        self.both, self.one, self.other = nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        x = torch.relu(self.one(self.both(x))) + torch.relu(self.other(self.both(x[:, :, ::2, ::2].repeat_interleave(2, 2)[:, :, :, :1])))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


NETWORKS = {
    "tiny_resnet": (tiny_resnet, 32),
    "resnet20": (resnet20, 32),
    "mobilenet": (_mobilenet, 32),
    "vgg11_bn": (_vgg11_bn, 64),
    "densenet": (_densenet, 64),
    "efficientnet": (_efficientnet, 32),
    "resnext": (_resnext, 64),
    "group_norms": (_resnet_with_group_norms, 64),
    "shufflenet": (lambda: torchvision.models.ShuffleNetV2([2, 2, 1], [24, 48, 96, 192, 256], CLASSES), 64),
    "convnext": (_convnext, 64),
    "vit": (_vit, 32),
    "swin": (_swin, 32),
    "gates": (Gates, 16),
    "tokens": (Tokens, 16),
    "mixer": (Mixer, 16),
    "statistics": (Statistics, 16),
    "windows": (Windows, 16),
    "up": (Up, 16),
    "recurrent": (Recurrent, 16),
    "nested": (Nested, 16),
    "spread": (Spread, 16),
    "heads": (Heads, 16),
}


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """(network, a batch of two inputs)."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    return with_statistics(make()), torch.randn(2, 3, size, size)


@functools.cache
def graph_of(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> Graph:
    """The network's graph on a batch of inputs, traced once a process: for tests that change nothing of it."""
    model, inputs = network(name)
    example = inputs[:batch] if batch <= len(inputs) else torch.randn(batch, *inputs.shape[1:])
    return Graph.trace(model.to(dtype), (example.to(dtype),))


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms with random scales, shifts and statistics; no bias is zero, which an exporter would leave out."""
    for norm in model.modules():
        if isinstance(norm, (nn.Conv2d, nn.Linear)) and norm.bias is not None:
            nn.init.normal_(norm.bias, 0.0, 0.1)
        if isinstance(norm, nn.Linear) and not norm.weight.any():
            nn.init.normal_(norm.weight, 0.0, 0.1)
        if isinstance(norm, nn.MultiheadAttention):
            nn.init.normal_(norm.in_proj_bias, 0.0, 0.1)
        if isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(norm.weight, 0.8, 1.6)
            nn.init.normal_(norm.bias, 0.1, 0.2)
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.8, 1.6)
            nn.init.normal_(norm.bias, 0.1, 0.2)
            nn.init.normal_(norm.running_mean, 0.0, 0.1)
            nn.init.uniform_(norm.running_var, 0.3, 0.9)
    return model.eval()


def random_policy(
    graph: Graph, seed: int, *, widths: bool = False, bits: tuple[int, ...] = (32,), multiple: int = 1, low_rank: bool = False
) -> Policy:
    """Half of the groups changed, a third of the blocks dropped, half of the layers factorised if any, bits drawn for every layer."""
    draw = random.Random(seed)
    groups = [group.name for group in graph.groups if group.prunable]
    ratios = {name: draw.uniform(0.1, 0.8) for name in groups if draw.random() < 0.5} or {groups[0]: 0.5}
    wider = {name: draw.uniform(1.0, 1.6) for name in groups if widths and draw.random() < 0.3}
    policy = Policy(
        student=StudentSpec(widths=wider, drop=tuple(b.name for b in graph.blocks if draw.random() < 0.33), multiple=multiple),
        prune=PruneSpec(ratios=ratios, criterion=CRITERIA[seed % len(CRITERIA)]),
        quant=QuantSpec(layers={layer.name: draw.choice(bits) for layer in graph.layers}),
    )
    factorable = [layer.name for layer in graph.layers if layer.factorable and low_rank]
    kept = {name: draw.uniform(0.2, 0.9) for name in factorable if draw.random() < 0.5} or dict.fromkeys(factorable, 0.5)
    return policy.model_copy(update={"low_rank": LowRankSpec(kept=kept)})
