"""SearchSpace: the policies that may be drawn for one traced model, and how to draw one.

The TOML file says which dimensions there are and how finely they are shared; the traced graph says what they apply to; the
device's profile cuts them (bits that have kernels). A space is also any callable `suggest(suggester) -> Policy`,
or `suggest(suggester, graph) -> Policy`.
"""

from __future__ import annotations

import inspect
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from autocompress.devices.base import DeviceProfile
from autocompress.errors import AutocompressError, UsageError, one_line
from autocompress.graph import Graph
from autocompress.policy import (
    KERNEL_BITS,
    STORAGE_BITS,
    AnswerLoss,
    Criterion,
    DistillSpec,
    FeatureLoss,
    LowRankSpec,
    Policy,
    PruneSpec,
    QuantSpec,
    StudentSpec,
)
from autocompress.record import Record, first_problem
from autocompress.references import call_function, draws_itself, nearest, require_name
from autocompress.suggesters import DefaultDistillation, SmallEnd, Suggester
from autocompress.task import Task

Suggest = Callable[[Suggester], Policy]
Number = TypeVar("Number", int, float)


class Range(Record):
    """An interval of values; `step` makes it a grid, `log` spaces it by ratio."""

    low: float
    high: float
    step: float | None = Field(None, gt=0)
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"`low <= high` must hold, but got low={self.low}, high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"a log range needs low > 0 and no step, but got low={self.low}, step={self.step}")
        return self

    def suggest(self, suggester: Suggester, name: str) -> float:
        return suggester.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


class WidthSpace(Range):
    low: float = Field(gt=0)
    high: float = Field(le=8)
    per: Literal["model", "stage", "group"] = "stage"


class DepthSpace(Record):
    min_blocks: int = Field(0, ge=0)
    per: Literal["stage", "block"] = "stage"

    @model_validator(mode="after")
    def _counted(self) -> DepthSpace:
        if self.per == "block" and self.min_blocks:
            raise ValueError(f'min_blocks counts the blocks of a stage: with per = "block" it must be left out, but got {self.min_blocks}')
        return self


class PruneSpace(Range):
    low: float = Field(ge=0)
    high: float = Field(lt=1)
    per: Literal["model", "stage", "group"] = "stage"
    criteria: tuple[Criterion, ...] = Field(("l2",), min_length=1)


class LowRankSpace(Range):
    """Of the share of a layer's multiplications that is kept."""

    low: float = Field(gt=0)
    high: float = Field(1.0, le=1)
    per: Literal["model", "stage", "layer"] = "stage"


class QuantSpace(Record):
    bits: tuple[int, ...]
    per: Literal["model", "stage", "layer"] = "stage"
    storage: bool = False

    @model_validator(mode="after")
    def _known(self) -> QuantSpace:
        if not self.bits or set(self.bits) - set(KERNEL_BITS + STORAGE_BITS):
            raise ValueError(f"bits must be some of {sorted(KERNEL_BITS + STORAGE_BITS)}, but got {list(self.bits)}")
        return self


class TemperatureSpace(Range):
    low: float = Field(gt=0)
    high: float = Field(le=100)


class ShareSpace(Range):
    low: float = Field(ge=0)
    high: float = Field(le=1)


class DistillSpace(Record):
    """Ranges, and choices; what is left out stays as usual."""

    answers: tuple[AnswerLoss, ...] | None = Field(None, min_length=1)
    standardized: tuple[bool, ...] | None = Field(None, min_length=1)
    feature_loss: tuple[FeatureLoss, ...] | None = Field(None, min_length=1)
    temperature: TemperatureSpace | None = None
    alpha: ShareSpace | None = None
    features: ShareSpace | None = None
    hidden: ShareSpace | None = None


class SpaceSpec(Record):
    """A file of search_spaces/. A missing table leaves that technique out."""

    name: str
    width: WidthSpace | None = None
    depth: DepthSpace | None = None
    prune: PruneSpace | None = None
    low_rank: LowRankSpace | None = None
    quant: QuantSpace | None = None
    distill: DistillSpace = DistillSpace()


def spaces_folder() -> Path:
    """Where the shipped spaces are: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "search_spaces"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "search_spaces"


def load_space(name: str) -> SpaceSpec:
    """A shipped space by name, or a TOML file. Raises UsageError that names the key."""
    shipped = {path.stem: path for path in sorted(spaces_folder().glob("*.toml"))}
    path = Path(name) if name.endswith(".toml") else shipped.get(name)
    if path is None:
        raise UsageError(f"unknown search space {name!r}", hint=f"{nearest(name, shipped)}; or give a file.toml or file.py:function")
    try:
        return SpaceSpec.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise UsageError(
            f"the search space {str(path)!r} cannot be read", hint="check the path; `default` and the other shipped spaces need none"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the search space {str(path)!r} is not TOML: {error}", hint="start from a copy of search_spaces/default.toml"
        ) from None
    except ValidationError as error:
        raise UsageError(
            f"the search space {str(path)!r} is not valid: {first_problem(error)}",
            hint=_cure(error),
        ) from None


def _cure(error: ValidationError) -> str:
    """The nearest key of the table for one that is unknown."""
    problem = error.errors()[0]
    table: type[Record] = SpaceSpec
    if problem["type"] != "extra_forbidden":
        return "docs/search-spaces.md says what each table takes; start from a copy of a file of search_spaces/"
    for key in problem["loc"][:-1]:
        annotation = table.model_fields[str(key)].annotation
        table = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Record))
    return nearest(str(problem["loc"][-1]), table.model_fields)


@dataclass(frozen=True)
class Stage:
    """A part of the network that shares dimensions.

    Args:
        name: the channel group of the residual stream, or the one group of a stage without stream.
        stream: that channel group where it is searchable, else None.
        inner: searchable groups that are not streams.
        blocks: droppable blocks in order.
        layers: quantizable layers that write into the stage.
        factorable: of these, those that may be of lower rank.
    """

    name: str
    stream: str | None
    inner: tuple[str, ...]
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    factorable: tuple[str, ...]


def stages_of(graph: Graph) -> tuple[Stage, ...]:
    """Assign every searchable group, block and layer to the residual stream that it feeds (or to itself)."""
    groups = {group.name: group for group in graph.groups}
    group_of = {layer.name: layer.group for layer in graph.layers}

    def home(name: str | None) -> str:
        if name is None or name not in groups:
            return "rest"
        if groups[name].stream:
            return name
        fed = [group_of.get(consumer) for consumer in groups[name].consumers]
        streams = [target for target in fed if target in groups and groups[target].stream]
        return streams[0] if streams else name

    names = list(dict.fromkeys([home(layer.group) for layer in graph.layers] + [home(g.name) for g in graph.groups]))
    stages = []
    for stage in names:
        group = groups.get(stage)
        inner = tuple(g.name for g in graph.groups if g.prunable and home(g.name) == stage and not (g.stream and g.name == stage))
        stages.append(
            Stage(
                name=stage,
                stream=stage if group is not None and group.stream and group.prunable else None,
                inner=inner,
                blocks=tuple(block.name for block in graph.blocks if block.stream == stage),
                layers=tuple(layer.name for layer in graph.layers if home(layer.group) == stage),
                factorable=tuple(layer.name for layer in graph.layers if layer.factorable and home(layer.group) == stage),
            )
        )
    return tuple(stages)


@dataclass(frozen=True)
class SearchSpace:
    """The policies of one graph on one device; `suggest` draws one."""

    spec: SpaceSpec
    stages: tuple[Stage, ...]
    bits: tuple[int, ...]
    profile: DeviceProfile
    reference: str | None = None

    @classmethod
    def build(cls, spec: SpaceSpec, graph: Graph, profile: DeviceProfile, *, reference: str | None = None) -> SearchSpace:
        """Cut the space to the graph and to the bits for which the device has kernels."""
        wanted = spec.quant.bits if spec.quant is not None else (32,)
        keep_storage = spec.quant is not None and spec.quant.storage
        bits = tuple(b for b in sorted(set(wanted)) if b in profile.bits or (keep_storage and b in STORAGE_BITS))
        return cls(spec, stages_of(graph), bits or (32,), profile, reference)

    def suggest(self, suggester: Suggester) -> Policy:
        """Draw one policy."""
        drop = self._drops(suggester)
        policy = Policy(
            student=StudentSpec(reference=self.reference, widths=self._widths(suggester), drop=drop),
            prune=PruneSpec(ratios=self._ratios(suggester), criterion=self._criterion(suggester)),
            low_rank=LowRankSpec(kept=self._kept(suggester)),
            quant=self._quant(suggester),
            distill=self._distill(suggester),
        )
        return for_device(policy, self.profile)

    def _drops(self, suggester: Suggester) -> tuple[str, ...]:
        if self.spec.depth is None:
            return ()
        if self.spec.depth.per == "block":
            blocks = [block for stage in self.stages for block in stage.blocks]
            return tuple(block for block in blocks if not suggester.suggest_int(f"keep:{block}", 0, 1))
        dropped: list[str] = []
        for stage in self.stages:
            total, least = len(stage.blocks), min(self.spec.depth.min_blocks, len(stage.blocks))
            if total > least:
                keep = suggester.suggest_int(f"depth:{stage.name}", least, total)
                kept = set(evenly_spaced(total, keep))
                dropped += [block for i, block in enumerate(stage.blocks) if i not in kept]
        return tuple(dropped)

    def _widths(self, suggester: Suggester) -> dict[str, float]:
        space = self.spec.width
        if space is None:
            return {}
        return self._shared("width", space.per, _groups, lambda name: space.suggest(suggester, name))

    def _ratios(self, suggester: Suggester) -> dict[str, float]:
        space = self.spec.prune
        if space is None:
            return {}
        return self._shared("prune", space.per, lambda stage: stage.inner, lambda name: space.suggest(suggester, name))

    def _criterion(self, suggester: Suggester) -> Criterion:
        criteria: tuple[Criterion, ...] = self.spec.prune.criteria if self.spec.prune is not None else ("l2",)
        return criteria[0] if len(criteria) == 1 else suggester.suggest_categorical("criterion", list(criteria))

    def _kept(self, suggester: Suggester) -> dict[str, float]:
        space = self.spec.low_rank
        if space is None:
            return {}
        drawn = self._shared("low_rank", space.per, lambda stage: stage.factorable, lambda name: space.suggest(suggester, name))
        return {layer: kept for layer, kept in drawn.items() if kept < 1.0}

    def _quant(self, suggester: Suggester) -> QuantSpec:
        def choose(name: str) -> int:
            return self.bits[0] if len(self.bits) == 1 else suggester.suggest_categorical(name, list(self.bits))

        per = self.spec.quant.per if self.spec.quant is not None else "model"
        layers = self._shared("bits", per, lambda stage: stage.layers, choose)
        common = Counter(layers.values()).most_common(1)[0][0] if layers else 32
        return QuantSpec(bits=common, layers={layer: bits for layer, bits in layers.items() if bits != common})

    def _shared(self, kind: str, per: str, members: Callable[[Stage], Sequence[str]], draw: Callable[[str], Number]) -> dict[str, Number]:
        """A value for each member of each stage: one for the whole model, one a stage, or one each, as `per` says."""
        drawn: dict[str, Number] = {}
        values: dict[str, Number] = {}
        for stage in self.stages:
            for member in members(stage):
                name = {"model": kind, "stage": f"{kind}:{stage.name}"}.get(per, f"{kind}:{member}")
                if name not in drawn:
                    drawn[name] = draw(name)
                values[member] = drawn[name]
        return values

    def _distill(self, suggester: Suggester) -> DistillSpec:
        spaces = {name: getattr(self.spec.distill, name) for name in DistillSpace.model_fields}
        return DistillSpec(**{name: _drawn(suggester, f"distill:{name}", space) for name, space in spaces.items() if space is not None})


def _drawn(suggester: Suggester, name: str, space: Range | tuple[Any, ...]) -> Any:
    return space.suggest(suggester, name) if isinstance(space, Range) else suggester.suggest_categorical(name, list(space))


def _groups(stage: Stage) -> tuple[str, ...]:
    return ((stage.stream,) if stage.stream else ()) + stage.inner


def evenly_spaced(total: int, keep: int) -> list[int]:
    """`keep` indices out of `total`, spread evenly, the first included: (9, 5) -> [0, 2, 4, 6, 8]."""
    if keep <= 1:
        return [0][:keep]
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def find_suggest(space: str, graph: Graph, profile: DeviceProfile, *, reference: str | None = None) -> Suggest:
    """How policies are drawn: from a shipped or own TOML space, or by the function that `file.py:function` returns; cut to the device."""
    require_name(space)
    if draws_itself(space):
        function = call_function(space)
        if not callable(function):
            raise UsageError(
                f"{space} must return a function suggest(trial) or suggest(trial, graph) -> Policy, but got {type(function).__name__}",
                hint="`file.py:function` is called once, and returns the function that draws",
            )
        return own_suggest(function, space, profile, graph)
    return SearchSpace.build(load_space(space), graph, profile, reference=reference).suggest


def suggest_of(task: Task, graphs: Mapping[str | None, Graph], profile: DeviceProfile) -> Suggest:
    """How the policies of a task are drawn; `graphs` as in `Setting`."""
    return find_suggest(task.space, graphs[task.student], profile, reference=task.student)


def for_device(policy: Policy, profile: DeviceProfile) -> Policy:
    """The policy as the device runs it: channels in multiples that suit its kernels, int8 weights in a range that it does not saturate."""
    multiple = math.lcm(policy.student.multiple, profile.channel_multiple)
    return with_exact_int8(policy.model_copy(update={"student": policy.student.model_copy(update={"multiple": multiple})}), profile)


def with_exact_int8(policy: Policy, profile: DeviceProfile) -> Policy:
    """The same student, its int8 weights in a range that the device computes with exactly."""
    quant = policy.quant
    in_int8 = 8 in (quant.bits, *quant.layers.values())
    reduced = quant.reduced_range or (in_int8 and profile.reduced_range)
    return policy.model_copy(update={"quant": quant.model_copy(update={"reduced_range": reduced})})


def own_suggest(function: Callable[..., Any], name: str, profile: DeviceProfile, graph: Graph) -> Suggest:
    """A user's function of a trial, or of a trial and the graph, as a space, cut to the device.

    Whatever it raises becomes a UsageError that names it; Optuna's own errors, of its storage, pass.
    """

    given = (graph,) if _takes_two(function) else ()

    def suggest(suggester: Suggester) -> Policy:
        try:
            policy = function(suggester, *given)
        except Exception as error:
            if isinstance(error, AutocompressError) or type(error).__module__.startswith("optuna."):
                raise
            raise UsageError(f"the space {name} raised {one_line(error)}", hint="--debug shows where") from error
        if not isinstance(policy, Policy):
            raise UsageError(
                f"the space {name} must draw a Policy, but drew {type(policy).__name__}", hint="return autocompress.Policy(...)"
            )
        return for_device(policy, profile)

    return suggest


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it must be given a second argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C do not tell
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 2


def with_default_distillation(suggest: Suggest) -> Suggest:
    """The same space with distillation as usual: its policies differ in structure only."""
    return lambda suggester: suggest(DefaultDistillation(suggester))


def fastest(suggest: Suggest) -> list[Policy]:
    """The policies at the fast end of every dimension, in each kind of arithmetic: int8 is slower than float32 on some devices."""
    return list({policy.digest: policy for policy in (suggest(SmallEnd(bits)) for bits in KERNEL_BITS)}.values())


def smallest(suggest: Suggest) -> Policy:
    """The policy at the small end of every dimension: the best guess at the one with the smallest file."""
    return suggest(SmallEnd(None))
