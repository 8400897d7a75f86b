from __future__ import annotations

import numpy as np
import optuna
import pytest
import torch

from autocompress.devices.base import DeviceProfile
from autocompress.errors import RunFolderError, UsageError
from autocompress.graph import Graph
from autocompress.policy import KERNEL_BITS, STORAGE_BITS, DistillSpec, Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.search_space import (
    SearchSpace,
    SpaceSpec,
    evenly_spaced,
    fastest,
    find_suggest,
    load_space,
    own_suggest,
    smallest,
    spaces_folder,
    stages_of,
    with_default_distillation,
)
from autocompress.suggesters import LevelSuggester, PartiallyFixed
from autocompress.testing.models import tiny_resnet

SHIPPED = sorted(path.stem for path in spaces_folder().glob("*.toml"))
INT8 = DeviceProfile(runtime="test", bits=(8, 32), reduced_range=True)
FLOAT = DeviceProfile(runtime="test", bits=(32,))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return Graph.trace(tiny_resnet(), (torch.zeros(1, 3, 32, 32),))


def draws(space, n=30, seed=0):
    generator = np.random.default_rng(seed)
    suggesters = [LevelSuggester(generator) for _ in range(n)]
    return [(suggester.params, space.suggest(suggester)) for suggester in suggesters]


def test_spaces_are_shipped():
    assert {"default", "per_layer", "cnn-int8", "mobile", "transformer", "tiny", "prune", "quantize", "everything"} == set(SHIPPED)


def test_a_rank_is_drawn_for_each_stage_and_a_layer_that_stays_whole_is_not_named(graph):
    space = SearchSpace.build(load_space("everything"), graph, INT8)
    named = [({k: v for k, v in params.items() if k.startswith("low_rank")}, policy.low_rank.kept) for params, policy in draws(space)]
    factorable = {layer.name for layer in graph.layers if layer.factorable}
    assert len(named[0][0]) == sum(1 for stage in space.stages if stage.factorable) > 1
    for drawn, kept in named:
        assert set(kept.values()) == {value for value in drawn.values() if value < 1.0}
        assert set(kept) <= factorable
    assert any(kept for _, kept in named)


def test_by_what_channels_are_chosen_is_drawn_only_where_a_space_says_so(graph):
    criteria = {name: {policy.prune.criterion for _, policy in draws(SearchSpace.build(load_space(name), graph, INT8))} for name in SHIPPED}
    assert criteria.pop("everything") == {"l2", "l1", "median", "scale"}
    assert all(drawn == {"l2"} for drawn in criteria.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_space_draws_policies_that_fit_the_network(name, graph):
    space = SearchSpace.build(load_space(name), graph, INT8)
    assert space.spec.name == name
    drawn = draws(space)
    for _, policy in drawn:
        graph.require_known(policy)
        assert graph.workload(policy).macs > 0
    assert len({policy.digest for _, policy in drawn}) > 10


@pytest.mark.parametrize("name", SHIPPED)
def test_the_same_parameters_give_the_same_policy(name, graph):
    space = SearchSpace.build(load_space(name), graph, INT8)
    for params, policy in draws(space, 5):
        assert space.suggest(optuna.trial.FixedTrial(params)) == policy


@pytest.mark.parametrize("name", SHIPPED)
def test_optuna_samples_the_space(name, graph):
    space = SearchSpace.build(load_space(name), graph, INT8)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(3):
        graph.require_known(space.suggest(study.ask()))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_smallest_policy_is_the_smallest(name, graph):
    space = SearchSpace.build(load_space(name), graph, INT8)
    least = graph.workload(smallest(space.suggest))
    assert least.macs <= min(graph.workload(policy).macs for _, policy in draws(space))
    assert least.macs <= graph.workload(Policy()).macs


@pytest.mark.parametrize("name", SHIPPED)
def test_the_fast_ends_are_of_each_arithmetic_and_the_smallest_has_the_fewest_bits(name, graph):
    space = SearchSpace.build(load_space(name), graph, INT8)
    fewest = graph.workload(smallest(space.suggest)).weight_bytes
    assert fewest <= min(graph.workload(policy).weight_bytes for _, policy in draws(space))
    ends = fastest(space.suggest)
    assert fewest <= min(graph.workload(end).weight_bytes for end in ends)
    wanted = dict.fromkeys(bits if bits in space.bits else min(space.bits) for bits in KERNEL_BITS)
    assert [{end.quant.of(layer.name) for layer in graph.layers} for end in ends] == [{bits} for bits in wanted]


@pytest.mark.parametrize("name", SHIPPED)
def test_bits_without_a_kernel_are_left_out(name, graph):
    spec = load_space(name)
    storage = set(spec.quant.bits) & set(STORAGE_BITS) if spec.quant is not None and spec.quant.storage else set()
    for _, policy in draws(SearchSpace.build(spec, graph, FLOAT)):
        assert {policy.quant.bits, *policy.quant.layers.values()} <= {32} | storage
        assert not policy.quant.reduced_range


def test_int8_weights_keep_to_the_range_of_the_device(graph):
    for profile in (INT8, INT8.model_copy(update={"reduced_range": False})):
        for _, policy in draws(SearchSpace.build(load_space("quantize"), graph, profile)):
            uses_int8 = 8 in {policy.quant.bits, *policy.quant.layers.values()}
            assert policy.quant.reduced_range == (uses_int8 and profile.reduced_range)


def test_stages_share_out_every_layer_block_and_group_once(graph):
    stages = stages_of(graph)
    layers = [layer for stage in stages for layer in stage.layers]
    blocks = [block for stage in stages for block in stage.blocks]
    groups = [name for stage in stages for name in [*([stage.stream] if stage.stream else []), *stage.inner]]
    assert sorted(layers) == sorted(layer.name for layer in graph.layers)
    assert sorted(blocks) == sorted(block.name for block in graph.blocks)
    assert sorted(groups) == sorted(group.name for group in graph.groups if group.prunable)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("name = 'x'", set()),
        ("name = 'x'\n[width]\nlow = 0.5\nhigh = 1.0\nper = 'model'", {"width"}),
        ("name = 'x'\n[width]\nlow = 0.5\nhigh = 1.0\nper = 'group'", {"width"}),
        ("name = 'x'\n[prune]\nlow = 0.0\nhigh = 0.5\nper = 'model'", {"prune"}),
        ("name = 'x'\n[depth]\nper = 'block'", {"keep"}),
        ("name = 'x'\n[quant]\nbits = [8, 32]\nper = 'model'", {"bits"}),
        ("name = 'x'\n[quant]\nbits = [8]", set()),
        ("name = 'x'\n[distill.alpha]\nlow = 0.5\nhigh = 1.0", {"distill"}),
    ],
)
def test_a_missing_table_leaves_a_technique_out(tmp_path, graph, text, kinds):
    path = tmp_path / "own.toml"
    path.write_text(text)
    for params, policy in draws(SearchSpace.build(load_space(str(path)), graph, INT8), 3):
        assert {name.partition(":")[0] for name in params} == kinds
        graph.require_known(policy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'\n[widht]\nlow = 1", "widht"),
        ("name = 'x'\n[width]\nlow = 0.5\nhigh = 1.0\nsteps = 2", "width.steps"),
        ("[width]\nlow = 0.5\nhigh = 1.0", "name"),
        ("name = 'x'\n[width]\nlow = 2.0\nhigh = 1.0", "low <= high"),
        ("name = 'x'\n[width]\nlow = 0.0\nhigh = 1.0", "width.low"),
        ("name = 'x'\n[prune]\nlow = 0.0\nhigh = 1.0", "prune.high"),
        ("name = 'x'\n[quant]\nbits = [9]", "bits must be some of"),
        ("name = 'x'\n[quant]\nbits = []", "bits must be some of"),
        ("name = 'x'\n[prune]\nlow = 0.0\nhigh = 0.5\nlog = true", "low > 0"),
        ("name = 'x'\n[distill.temperature]\nlow = 0.0\nhigh = 1.0", "distill.temperature.low"),
        ("name = 'x'\n[distill.temperature]\nlow = 1.0\nhigh = 200.0", "distill.temperature.high"),
        ("name = 'x'\n[distill.alpha]\nlow = 0.5\nhigh = 1.5", "distill.alpha.high"),
        ("name = 'x'\n[depth]\nper = 'block'\nmin_blocks = 2", "min_blocks counts the blocks of a stage"),
        ("name = ", "not TOML"),
    ],
)
def test_a_bad_space_is_refused_by_key(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_space(str(path))


def test_mistyped_names_come_with_the_nearest(tmp_path):
    (tmp_path / "own.toml").write_text("name = 'x'\n[widht]\nlow = 1")
    (tmp_path / "key.toml").write_text("name = 'x'\n[distill.alpha]\nlow = 0.5\nhigh = 1.0\nsteps = 2")
    for name, hint in (("defualt", "default"), (str(tmp_path / "own.toml"), "width"), (str(tmp_path / "key.toml"), "step")):
        with pytest.raises(UsageError) as caught:
            load_space(name)
        assert f"did you mean {hint}?" in caught.value.hint
    (tmp_path / "value.toml").write_text("name = 'x'\n[width]\nlow = 2.0\nhigh = 1.0")
    with pytest.raises(UsageError) as caught:
        load_space(str(tmp_path / "value.toml"))
    assert "docs/search-spaces.md" in caught.value.hint, "the name is right"
    with pytest.raises(UsageError, match="cannot be read"):
        load_space(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(("total", "keep", "kept"), [(9, 5, [0, 2, 4, 6, 8]), (4, 1, [0]), (4, 0, []), (3, 3, [0, 1, 2])])
def test_kept_blocks_are_spread(total, keep, kept):
    assert evenly_spaced(total, keep) == kept


OWN = """
from autocompress import Policy, QuantSpec
def space(): return lambda trial: Policy(quant=QuantSpec(bits=trial.suggest_categorical("bits", [8, 32])))
def number(): return 3
def short(): return lambda trial: Policy(quant=QuantSpec(bits=[][0]))
def word(): return lambda trial: "int8"
"""


def test_a_space_may_be_a_function(tmp_path, graph):
    (tmp_path / "own.py").write_text(OWN)
    suggest = find_suggest(f"{tmp_path}/own.py:space", graph, INT8)
    assert suggest(optuna.trial.FixedTrial({"bits": 8})).quant.bits == 8
    with pytest.raises(UsageError, match="must return a function"):
        find_suggest(f"{tmp_path}/own.py:number", graph, INT8)


@pytest.mark.parametrize(("name", "message"), [("short", "raised IndexError: list index"), ("word", "must draw a Policy, but drew str")])
def test_what_a_function_of_ones_own_does_wrong_is_said(tmp_path, graph, name, message):
    (tmp_path / "wrong.py").write_text(OWN)
    suggest = find_suggest(f"{tmp_path}/wrong.py:{name}", graph, INT8)
    with pytest.raises(UsageError, match=rf"wrong\.py:{name} {message}"):
        suggest(LevelSuggester(np.random.default_rng(0)))


def test_a_function_may_be_given_the_graph(tmp_path, graph):
    (tmp_path / "own.py").write_text(
        "from autocompress import Policy, PruneSpec\n"
        "def space():\n    return suggest\n"
        "def suggest(trial, graph):\n"
        "    names = [group.name for group in graph.groups if group.prunable]\n"
        "    return Policy(prune=PruneSpec(ratios={name: trial.suggest_float(name, 0.0, 0.5) for name in names}))\n"
    )
    drawn = find_suggest(f"{tmp_path}/own.py:space", graph, INT8)(LevelSuggester(np.random.default_rng(0)))
    assert drawn.prune.ratios.keys() == {group.name for group in graph.groups if group.prunable} != set()
    for function in (lambda trial, extra=1: Policy(), lambda trial: Policy(), lambda *arguments: Policy()):
        assert isinstance(own_suggest(function, "own", INT8, graph)(None), Policy)


def test_errors_of_ours_and_of_optunas_storage_pass_through_a_space(graph):
    for error in (RunFolderError("full"), optuna.exceptions.StorageInternalError("full")):

        def fail(trial, error=error):
            raise error

        with pytest.raises(type(error)):
            own_suggest(fail, "own", INT8, graph)(LevelSuggester(np.random.default_rng(0)))


@pytest.mark.parametrize("reference", [None, "m:f"])
def test_the_space_of_a_student_names_its_reference(graph, reference):
    suggest = find_suggest("default", graph, INT8, reference=reference)
    assert suggest(LevelSuggester(np.random.default_rng(0))).student.reference == reference


def test_an_empty_spec_draws_the_default_policy(graph):
    space = SearchSpace.build(SpaceSpec(name="x"), graph, INT8)
    assert space.suggest(LevelSuggester(np.random.default_rng(0))) == Policy(student=StudentSpec(multiple=INT8.channel_multiple))


def test_what_a_function_draws_is_cut_to_the_device(graph):
    profile = INT8.model_copy(update={"channel_multiple": 8})
    drawn = {
        "mixed": Policy(quant=QuantSpec(bits=32, layers={"a": 8})),
        "float": Policy(quant=QuantSpec(bits=32)),
        "own": Policy(student=StudentSpec(multiple=12), quant=QuantSpec(bits=8)),
    }
    cut = {name: own_suggest(lambda _, policy=policy: policy, name, profile, graph)(None) for name, policy in drawn.items()}
    assert [policy.quant.reduced_range for policy in cut.values()] == [True, False, True]
    assert [policy.student.multiple for policy in cut.values()] == [8, 8, 24]


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda s: s.suggest_float("distill:temperature", 1.0, 8.0, log=True), 4.0),
        (lambda s: s.suggest_float("distill:temperature", 5.0, 8.0), 5.0),
        (lambda s: s.suggest_float("distill:temperature", 1.0, 8.0, step=2.0), 5.0),
        (lambda s: s.suggest_float("distill:temperature", 1.0, 3.5, step=2.0), 3.0),
        (lambda s: s.suggest_int("distill:temperature", 1, 8), 4),
        (lambda s: s.suggest_categorical("distill:temperature", [1, 3, 8]), 3),
    ],
)
def test_a_structure_is_distilled_as_nearly_as_usual_as_the_space_allows(draw, expected):
    def space(suggester):
        pruned = suggester.suggest_int("pruned", 0, 5) + suggester.suggest_categorical("more", [0, 1])
        return Policy(distill=DistillSpec(temperature=draw(suggester)), prune=PruneSpec(ratios={"group": 0.1 * pruned}))

    suggesters = [LevelSuggester(np.random.default_rng(seed)) for seed in range(9)]
    policies = [with_default_distillation(space)(suggester) for suggester in suggesters]
    assert len({policy.digest for policy in policies}) > 3
    assert all(set(suggester.params) == {"pruned", "more"} for suggester in suggesters)
    assert {policy.distill.temperature for policy in policies} == {expected}


def test_a_structure_that_is_known_is_drawn_again_and_distilled_otherwise():
    def space(suggester):
        temperature = suggester.suggest_float("distill:temperature", 1.0, 8.0, log=True)
        share = suggester.suggest_float("share", 0.0, 0.5) + 0.1 * suggester.suggest_int("pruned", 0, 3)
        return Policy(
            distill=DistillSpec(temperature=temperature),
            prune=PruneSpec(ratios={suggester.suggest_categorical("group", ["a", "b"]): share}),
        )

    known, other = LevelSuggester(np.random.default_rng(0)), LevelSuggester(np.random.default_rng(1))
    before = with_default_distillation(space)(known)
    after = space(PartiallyFixed(known.params, other))
    assert list(other.params) == ["distill:temperature"]
    assert after == before.model_copy(update={"distill": DistillSpec(temperature=other.params["distill:temperature"])})
