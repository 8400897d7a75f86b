"""Banking77 (77 intents of a bank's customers) and a small transformer, trained on the spot, for the benchmarks.

    .venv/bin/python benchmarks/banking77.py --seconds 300 --out runs/banking77.safetensors

`data` and `transformer` are references for a task: `--data benchmarks/banking77.py:data --model benchmarks/banking77.py:transformer
--weights runs/banking77.safetensors`. Words are looked up in a vocabulary of the training questions; a question is its first 24 words.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from cifar10 import folder

from autocompress import Data, Split
from autocompress.compress.rates import TrainPlan
from autocompress.compress.train import train
from autocompress.data import stratified
from autocompress.trial.evaluate import score_model

WORDS, WORD = 2048, re.compile(r"[a-z0-9']+")
PADDING, UNKNOWN = 0, 1
LENGTH = 24
CLASSES = 77
VAL_FRACTION = 0.1


def _rows(name: str) -> list[tuple[list[str], str]]:
    """(words, intent) of each question."""
    with gzip.open(folder() / "text" / f"banking77_{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return [(WORD.findall(row["text"].lower()), row["category"]) for row in csv.DictReader(file)]


def data() -> Data:
    """9,000 questions to train on, 1,000 to validate, the 3,080 of the test set untouched; inputs are n x 24 numbers of words."""
    labels = {name: index for index, name in enumerate(json.loads((folder() / "text" / "banking77_categories.json").read_text()))}
    train_rows, test_rows = _rows("train"), _rows("test")
    counted = Counter(word for words, _ in train_rows for word in words)
    known = {word: index for index, (word, _) in enumerate(counted.most_common(WORDS - 2), start=2)}

    def split(rows: list[tuple[list[str], str]]) -> Split:
        inputs = torch.full((len(rows), LENGTH), PADDING)
        for row, (words, _) in zip(inputs, rows, strict=True):
            numbers = torch.tensor([known.get(word, UNKNOWN) for word in words[:LENGTH]], dtype=torch.long)
            row[: len(numbers)] = numbers
        return Split(inputs, torch.tensor([labels[intent] for _, intent in rows]))

    whole = split(train_rows)
    rest, val = stratified(whole.targets, VAL_FRACTION)
    return Data(whole[rest], whole[val], split(test_rows), classes=CLASSES)


class Block(nn.Module):
    """Attention and two layers, each behind its LayerNorm (Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        normed = self.before_attention(x)
        q, k, v = (layer(normed).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Transformer(nn.Module):
    """An encoder whose outputs are averaged over the positions."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, dropout: float = 0.3) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.dropout(self.words(x) + self.positions))
        return self.head(self.dropout(self.norm(features).mean(1)))


def transformer() -> nn.Module:
    """Four blocks of width 128 and four heads (1.1 million parameters), with the weights that training begins with."""
    torch.manual_seed(0)
    return Transformer()


def main() -> None:
    """Train it, and say what it scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=Path("runs/banking77.safetensors"))
    options = parser.parse_args()
    questions, model = data(), transformer()
    train(model, questions, TrainPlan(10**9, time.monotonic() + options.seconds, learning_rate=0.05))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out)
    print(f"validation {100 * score_model(model, questions, questions.val).value:.2f} %, written to {options.out}")


if __name__ == "__main__":
    main()
