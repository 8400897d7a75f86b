"""Likeness to the teacher of students that were not trained."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from running import TASK
from tasks import SLOW_CALLS, blobs

from autocompress.candidates.appraisals import Appraisals
from autocompress.candidates.likeness import Likeness
from autocompress.compress.student import build_student
from autocompress.errors import UsageError
from autocompress.policy import Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.setup.loading import load
from autocompress.setup.setting import Setting
from autocompress.study.database import open_journal
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice
from autocompress.trial.preparation import prepare


@pytest.fixture(scope="module")
def setting(net, data, tmp_path_factory) -> Setting:
    task = Task(model="own:net", data="own:blobs")
    return prepare(task, tmp_path_factory.mktemp("likeness"), load(task, model=net, data=data, device=FakeDevice(SLOW_CALLS)))


def pruned(setting, ratio, **changes) -> Policy:
    groups = [group.name for group in setting.graphs[None].groups if group.prunable]
    return Policy(prune=PruneSpec(ratios=dict.fromkeys(groups, ratio)), **changes)


def test_the_teacher_is_like_itself_in_fewer_bits_almost_and_the_less_the_more_is_gone(setting):
    likeness = Likeness(setting)
    found = [likeness(policy) for policy in (Policy(), Policy(quant=QuantSpec(bits=8)), pruned(setting, 0.25), pruned(setting, 0.75))]
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert found == sorted(found, reverse=True)
    assert found[1] > 0.95
    assert 0.0 < found[3] < 0.9 * found[2]


def test_bits_count(setting):
    """Of two students of the same shape the one in two bits is less like the teacher."""
    likeness = Likeness(setting)
    assert likeness(pruned(setting, 0.25, quant=QuantSpec(bits=2))) < likeness(pruned(setting, 0.25)) - 0.02


def test_students_are_reconstructed(setting):
    policy = pruned(setting, 0.5, student=StudentSpec(drop=(setting.graphs[None].blocks[0].name,)))
    likeness = Likeness(setting)
    cut = likeness.answers(build_student(setting.graphs[None], policy))
    assert likeness(policy) > 1.2 * float(torch.minimum(cut.softmax(1), likeness.wanted.softmax(1)).sum(1).mean())


def test_of_answers_that_are_no_classes_the_squared_difference_counts(setting):
    values = replace(setting, data=replace(blobs(), classes=None, loss=torch.nn.functional.mse_loss, score=lambda *_: 0.0))
    likeness = Likeness(values)
    near, far = (likeness(pruned(setting, ratio)) for ratio in (0.25, 0.75))
    assert likeness(Policy()) == pytest.approx(1.0)
    assert 0.0 < far < near < 1.0


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError(), ValueError("cannot convert NaN to integer")])
def test_a_student_that_cannot_be_made_is_worth_nothing_and_ends_no_search(setting, monkeypatch, error):
    def fail(*_):
        raise error

    likeness = Likeness(setting)
    monkeypatch.setattr("autocompress.candidates.likeness.reconstruct", fail)
    assert likeness(pruned(setting, 0.5)) == 0.0
    assert likeness(Policy()) == pytest.approx(1.0, abs=1e-5), "nothing of it is to be reconstructed"


def test_answers_that_are_no_numbers_are_like_nothing(setting, monkeypatch):
    likeness = Likeness(setting)
    monkeypatch.setattr(Likeness, "answers", lambda self, network: torch.full_like(self.wanted, torch.nan))
    assert likeness(Policy()) == 0.0


def test_errors_of_the_machine_are_no_policys(setting, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    likeness = Likeness(setting)
    monkeypatch.setattr("autocompress.candidates.likeness.reconstruct", fail)
    with pytest.raises(OSError, match="disk full"):
        likeness(pruned(setting, 0.5))


def test_an_original_that_cannot_be_asked_ends_the_search_with_the_reason(forecast, tmp_path, monkeypatch):
    monkeypatch.setattr(Likeness, "answers", Mock(side_effect=RuntimeError("can't allocate memory")))
    appraisals = Appraisals(open_journal(tmp_path, TASK, resume=False), forecast)
    with pytest.raises(UsageError, match=r"the original cannot answer .* can.t allocate memory"):
        appraisals.appraise(forecast.proposal(Policy(), {}))
