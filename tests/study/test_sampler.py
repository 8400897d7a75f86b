"""The sampler and its model of the objectives, against what they can be computed or counted by."""

from __future__ import annotations

import itertools
import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.optimize import check_grad

from autocompress.ranking.front import hypervolume
from autocompress.study.gaussian import GaussianProcess, Prior
from autocompress.study.sampler import STARTUP, FrontSampler, Space, expected_improvement

EVERY_KIND = {
    "plain": FloatDistribution(-1.0, 3.0),
    "log": FloatDistribution(1e-4, 1.0, log=True),
    "stepped": FloatDistribution(0.25, 1.5, step=0.25),
    "int": IntDistribution(3, 12, step=3),
    "log int": IntDistribution(1, 64, log=True),
    "choice": CategoricalDistribution((4, 8, None, "32")),
    "one step": IntDistribution(0, 1),
}


# -- the space --------------------------------------------------------------------------------------------------------


def test_what_is_drawn_or_varied_are_values_of_the_space_and_come_back_as_they_were():
    space, generator = Space(EVERY_KIND), np.random.default_rng(0)
    drawn = space.draw(200, generator)
    for row in [*drawn, *space.mutants(drawn[:3], 200, generator)]:
        params = space.decode(row)
        for name, distribution in EVERY_KIND.items():
            assert distribution._contains(distribution.to_internal_repr(params[name])), (name, params[name])
        again = space.decode(space.encode(params))
        assert {name: pytest.approx(value) if isinstance(value, float) else value for name, value in params.items()} == again


def test_all_values_of_a_grid_are_drawn_equally_often():
    space = Space({"stepped": EVERY_KIND["stepped"], "int": EVERY_KIND["int"], "choice": EVERY_KIND["choice"]})
    rows = space.draw(6000, np.random.default_rng(0))
    values = [space.decode(row) for row in rows]
    for name, expected in (("stepped", [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]), ("int", [3, 6, 9, 12]), ("choice", [4, 8, None, "32"])):
        counts = [sum(v[name] == value for v in values) for value in expected]
        assert sum(counts) == 6000
        assert max(counts) < 1.2 * min(counts)


def test_a_mutant_has_few_changes_and_all_of_them_can_be_reached():
    space, generator = Space({f"x{i}": IntDistribution(0, 9) for i in range(50)}), np.random.default_rng(0)
    parent = space.draw(1, generator)
    changed = space.mutants(parent, 2000, generator) != parent
    assert 1.0 < changed.sum(1).mean() < 2.5
    assert changed.any(0).all()


def test_points_of_two_choices_and_of_two_ends_are_one_apart():
    space = Space({"choice": CategoricalDistribution("abc"), "x": FloatDistribution(2.0, 6.0)})
    a, b, c = space.points(np.array([space.encode({"choice": k, "x": x}) for k, x in (("a", 2.0), ("b", 2.0), ("b", 6.0))]))
    assert np.linalg.norm(a - b) == pytest.approx(1.0)
    assert np.linalg.norm(b - c) == pytest.approx(1.0)
    assert list(space.owners) == [0, 0, 0, 1]


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_likelihood():
    generator = np.random.default_rng(0)
    x, y = generator.random((20, 5)), generator.standard_normal(20)
    process = GaussianProcess(x, y, np.array([0, 0, 1, 2, 2]), fit=False)
    for _ in range(3):
        theta = process.theta + 0.5 * generator.standard_normal(len(process.theta))
        error = check_grad(lambda t: process._loss(t)[0], lambda t: process._loss(t)[1], theta)
        assert error < 1e-3 * np.linalg.norm(process._loss(theta)[1])


def test_a_process_knows_what_it_was_told_and_doubts_the_rest():
    generator = np.random.default_rng(0)
    x = generator.random((40, 3))
    y = 5.0 + 2.0 * x[:, 0] + np.sin(4 * x[:, 1])  # the third tells nothing
    process = GaussianProcess(x, y, np.arange(3))
    mean, deviation = process.predict(x)
    assert np.abs(mean - y).max() < 0.05
    unseen = generator.random((200, 3))
    mean, deviation_unseen = process.predict(unseen)
    assert np.abs(mean - (5.0 + 2.0 * unseen[:, 0] + np.sin(4 * unseen[:, 1]))).mean() < 0.1
    assert deviation_unseen.mean() > deviation.mean()
    assert process.predict(unseen + 100.0)[1].min() > 10 * deviation.max(), "far away it knows nothing"
    weights = np.exp(process.theta[:3])
    assert weights[2] < 0.1 * weights[1]


def test_values_that_are_all_the_same_are_no_trouble():
    mean, deviation = GaussianProcess(np.eye(4), np.full(4, 3.0), np.arange(4)).predict(np.eye(4))
    assert mean == pytest.approx(3.0)
    assert np.isfinite(deviation).all()


def test_length_scales_are_expected_to_grow_with_the_number_of_dimensions():
    assert Prior.of(100).mean[0] == pytest.approx(Prior.of(1).mean[0] - math.log(100))


# -- what is worth most -----------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_the_expected_improvement_is_the_mean_of_improvements(seed, n):
    """Against Monte Carlo with the hypervolume itself."""
    generator = np.random.default_rng(seed)
    up = np.sort(generator.random(n))
    front = np.stack([up, np.sort(generator.random(n))[::-1]], 1)
    mean, deviation = generator.random((1, 2)), 0.05 + 0.3 * generator.random((1, 2))

    def area(points):
        return hypervolume(points * [1.0, -1.0], (0.0, 0.0))

    draws = mean + deviation * generator.standard_normal((2000, 2))
    gains = np.array([area(np.vstack([front, draw])) for draw in draws]) - area(front)
    expected = expected_improvement(front, mean, deviation)[0]
    assert expected == pytest.approx(gains.mean(), abs=5 * gains.std() / math.sqrt(len(draws)) + 1e-4)


# -- whole studies ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study_of(seed=0, sampler=None):
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler or FrontSampler(seed=seed))


def run(study, ask, n):
    points = []
    for _ in range(n):
        trial = study.ask()
        points.append(ask(trial))
        study.tell(trial, points[-1])
    return points


LAYERS = 8
COST = np.random.default_rng(1).random(LAYERS) + 0.2
HARM = np.random.default_rng(2).random(LAYERS) + 0.05


def additive(trial):
    bits = np.array([trial.suggest_int(f"bits:{i}", 1, 4) for i in range(LAYERS)])
    return float(1.0 - (HARM * 4.0**-bits).sum()), float((COST * bits).sum())


def share(points):
    every = np.array(list(itertools.product(range(1, 5), repeat=LAYERS)))
    truth = np.stack([1.0 - (HARM * 4.0**-every).sum(1), (COST * every).sum(1)], 1)
    reference = (truth[:, 0].min(), truth[:, 1].max())
    return hypervolume(np.array(points), reference) / hypervolume(truth, reference)


def test_it_finds_more_of_a_front_than_the_others_at_the_same_number():
    """Of 65,536 policies 60 are asked."""
    ours = np.mean([share(run(study_of(seed), additive, 60)) for seed in range(3)])
    for rival in (optuna.samplers.TPESampler, optuna.samplers.NSGAIISampler, optuna.samplers.RandomSampler):
        theirs = np.mean([share(run(study_of(sampler=rival(seed=seed)), additive, 60)) for seed in range(3)])
        assert ours > theirs, rival.__name__
    assert ours > 0.94


def test_units_and_cliffs_of_the_objectives_do_not_matter():
    """What is monotone in the objectives leaves their ranks, and so the whole search, as they were."""

    def bent(trial):
        score, cost = additive(trial)
        return -math.exp(-9.0 * score), 1e6 * cost**3

    straight, other = study_of(), study_of()
    run(straight, additive, 30)
    run(other, bent, 30)
    assert [t.params for t in straight.trials] == [t.params for t in other.trials]


def constrained(n, **kept):
    """A study of so many trials under a budget, the scores of which are lies where they are over it; `kept` are constraints besides."""
    study = study_of()
    for _ in range(n):
        trial = study.ask()
        score, cost = additive(trial)
        over = cost / (0.4 * 4 * COST.sum()) - 1.0
        for name, value in ({"budget": over} | kept).items():
            trial.set_constraint(name, value)
        study.tell(trial, [99.0 if over > 0 else score, cost])
    return study


def test_what_violates_a_constraint_is_avoided_and_its_values_are_not_believed():
    late = constrained(60).trials[STARTUP + 10 :]
    kept = sum(trial.constraints["budget"] <= 0 for trial in late) / len(late)
    uniform = np.random.default_rng(0).integers(1, 5, (4000, LAYERS)) @ COST <= 0.4 * 4 * COST.sum()
    assert kept > 0.7 > 2 * uniform.mean()


def test_nothing_is_asked_twice_while_there_is_something_new():
    study = study_of()
    run(study, lambda t: (float(t.suggest_int("a", 0, 5)), float(t.suggest_categorical("b", (1, 2, 3, 4, 5)))), 26)
    modelled = [tuple(sorted(trial.params.items())) for trial in study.trials[STARTUP:]]
    assert len(set(modelled)) == len(modelled)
    run(study, lambda t: (float(t.suggest_int("a", 0, 5)), float(t.suggest_categorical("b", (1, 2, 3, 4, 5)))), 20)  # and then no crash


def test_dimensions_that_come_and_go_are_suggested_too():
    def conditional(trial):
        deep = trial.suggest_categorical("deep", (True, False))
        cost = trial.suggest_float("y", 0, 1) if deep else trial.suggest_int("z", 1, 30)
        return float(trial.suggest_float("x", 0, 1)), float(cost)

    study = study_of()
    run(study, conditional, 60)
    assert {frozenset(trial.params) for trial in study.trials} == {frozenset({"deep", "x", "y"}), frozenset({"deep", "x", "z"})}
    late = [trial.params["y"] for trial in study.trials[STARTUP:] if "y" in trial.params]
    assert np.mean(late) < 0.4, "of what is not shared, what costs little"


def test_a_failed_trial_is_nothing_to_learn_from_and_one_sampler_serves_several_studies():
    sampler = FrontSampler(seed=0)
    for _ in range(2):
        study = study_of(sampler=sampler)
        run(study, additive, STARTUP)
        study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
        run(study, additive, 3)
        assert len(study.trials[-1].params) == LAYERS


def test_other_numbers_of_objectives_are_refused():
    study = optuna.create_study(sampler=FrontSampler())
    with pytest.raises(ValueError, match="two objectives, but the study has 1"):
        study.ask({"x": FloatDistribution(0, 1)})


def test_where_constraints_are_violated_stays_known_in_a_long_study(monkeypatch):
    """Seen in an hour's search: each sound trial kept one constraint by exactly 0, and 150 suggestions in a row were over the budget."""
    monkeypatch.setattr("autocompress.study.sampler.MOST_POINTS", 30)
    late = constrained(100, outclassed=0.0).trials[60:]
    assert sum(trial.constraints["budget"] <= 0 for trial in late) > 0.6 * len(late)


def test_what_is_worth_little_counts_for_nothing_where_that_is_said():
    shares = []
    for least in (None, lambda values: 0.5 * max(values)):
        study = study_of(sampler=FrontSampler(seed=0, least=least))
        points = run(
            study, lambda trial: (trial.suggest_float("x", 0, 1) ** 2, trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1)), 50
        )
        shares.append(np.mean([score < 0.5 for score, _ in points[STARTUP:]]))
    assert shares[1] < 0.5 * shares[0]
