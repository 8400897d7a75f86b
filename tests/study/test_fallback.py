"""A sampler that fails: the search goes on with random draws, and says so."""

from __future__ import annotations

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.samplers import GridSampler, RandomSampler

from autocompress.study.database import open_journal
from autocompress.task import Task

TASK = Task(model="own:net", data="own:data")


class Failing(RandomSampler):
    """Fails at one of the things that a sampler is asked for."""

    def __init__(self, at, error):
        super().__init__(seed=0)
        self._at, self._error = at, error

    def __getattribute__(self, name):
        if name in ("_at", "_error") or name != self._at:
            return super().__getattribute__(name)
        raise self._error


def drawn(journal, n=20):
    found = []
    for _ in range(n):
        trial = journal.study.ask()
        found.append(trial.suggest_int("bits", 2, 8))
        journal.study.tell(trial, [0.5, 0.1])
    return found


@pytest.mark.parametrize("at", ["before_trial", "infer_relative_search_space", "sample_relative", "sample_independent", "after_trial"])
def test_whatever_it_fails_at_values_are_drawn_all_the_same(tmp_path, at):
    journal = open_journal(tmp_path, TASK, resume=False, sampler=Failing(at, FloatingPointError("singular matrix")))
    assert journal.sampler_failure is None
    assert len(set(drawn(journal))) > 3
    assert "singular matrix" in journal.sampler_failure


def test_one_that_works_is_what_draws(tmp_path):
    journal = open_journal(tmp_path, TASK, resume=False, sampler=RandomSampler(seed=3))
    plain = optuna.create_study(sampler=RandomSampler(seed=3), directions=["maximize", "minimize"])
    for _ in range(5):
        ours, theirs = journal.study.ask(), plain.ask()
        assert ours.suggest_float("ratio", 0.0, 1.0) == theirs.suggest_float("ratio", 0.0, 1.0)
    assert journal.sampler_failure is None


def test_a_storage_that_fails_is_not_the_samplers_fault(tmp_path):
    journal = open_journal(tmp_path, TASK, resume=False, sampler=Failing("sample_relative", StorageInternalError("disk full")))
    with pytest.raises(StorageInternalError):
        drawn(journal, 1)


def test_one_that_walks_a_grid_may_end_it(tmp_path):
    journal = open_journal(tmp_path, TASK, resume=False, sampler=GridSampler({"bits": [4, 8]}))
    for _ in range(2):
        trial = journal.study.ask()
        trial.suggest_categorical("bits", [4, 8])
        journal.tell_ruled_out(trial, 0.1, over_budget=1.0, outclassed=0.0)
    assert journal.is_exhausted
    assert journal.sampler_failure is None
