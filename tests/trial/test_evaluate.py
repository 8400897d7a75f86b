from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from autocompress.data import Data, Split
from autocompress.errors import PolicyFailure
from autocompress.ranking.scores import is_share, knows_validation_like_training
from autocompress.records import Score
from autocompress.trial.evaluate import score_model, score_outputs

SPLIT = Split(torch.eye(4), torch.tensor([0, 1, 2, 0]))
DATA = Data(SPLIT, SPLIT, SPLIT, classes=4)


def test_accuracy_is_the_share_of_right_answers():
    score = score_outputs(torch.eye(4), SPLIT.targets, DATA)
    assert (score.name, score.value, score.direction, score.n) == ("accuracy", 0.75, "maximize", 4)


def test_a_task_may_bring_its_own_score():
    own = Data(SPLIT, SPLIT, SPLIT, loss=nn.functional.cross_entropy, score=lambda y, t: float(y.sum() + len(t)), score_name="sum")
    score = score_outputs(torch.eye(4), SPLIT.targets, own)
    assert (score.name, score.value) == ("sum", 8.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_fail_the_policy(bad):
    outputs = torch.eye(4)
    outputs[3, 1] = bad
    with pytest.raises(PolicyFailure, match="finite"):
        score_outputs(outputs, SPLIT.targets, DATA)


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_a_live_model_is_scored_in_eval_mode_whatever_the_batch(batch):
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity()).train()
    assert score_model(model, DATA, SPLIT, batch_size=batch).value == 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_fails_the_policy(value):
    own = Data(SPLIT, SPLIT, SPLIT, loss=nn.functional.cross_entropy, score=lambda y, t: value)
    with pytest.raises(PolicyFailure, match="the score of a model must be finite"):
        score_outputs(torch.eye(4), SPLIT.targets, own)


def test_a_score_of_ones_own_has_its_own_name_and_direction():
    def mean_error(outputs, targets):
        return 0.5

    own = Data(SPLIT, SPLIT, SPLIT, loss=nn.functional.cross_entropy, score=mean_error, score_direction="minimize")
    score = score_outputs(torch.eye(4), SPLIT.targets, own)
    assert (score.name, score.direction, score.gain) == ("mean_error", "minimize", -0.5)
    assert not is_share(score)
    assert [is_share(Score(name=name, value=0.5)) for name in ("accuracy", "top5", "top-1 accuracy", "accuracy@5")] == [True] * 4
    assert not any(is_share(Score(name=name, value=0.5)) for name in ("topic_coherence", "accuracyloss"))
    unnamed = Data(SPLIT, SPLIT, SPLIT, loss=nn.functional.cross_entropy, score=lambda y, t: 0.5)
    assert unnamed.scored_by == "score"


@pytest.mark.parametrize(
    ("n", "val", "knows"), [(1000, 0.997, True), (1000, 0.94, False), (50, 0.94, False), (50, 1.0, True)],
    ids=["as well", "less well", "who can tell", "without a fault"],
)  # fmt: skip
def test_few_examples_do_not_tell_that_a_model_was_trained_on_them(n, val, knows):
    """Of 50 a gap of six points may be chance: that is no sign that there is none."""
    assert knows_validation_like_training(Score(value=1.0, n=n), Score(value=val, n=n)) is knows
