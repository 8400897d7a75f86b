"""Task: everything that defines one search, from a TOML file, the command line or Python."""

from __future__ import annotations

import json
import os
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator

from autocompress.budget import Budget
from autocompress.errors import RunFolderError, UsageError
from autocompress.record import Record, first_problem
from autocompress.references import (
    AGENT,
    AGENT_PORT,
    DATA_READERS,
    DEFAULT_DEVICE,
    DEMO,
    MODEL_LIBRARIES,
    OBJECT,
    absolute_data,
    absolute_function,
    absolute_model,
    absolute_path,
    draws_itself,
    names_function,
    nearest,
    parse_reference,
)
from autocompress.system.run_folder import is_own_file
from autocompress.units import parse_duration

DEMO_MODEL = f"{DEMO}teacher"
DEMO_DATA = "digits"
DATA_VARIABLE = "AUTOCOMPRESS_DATA"
TASK_FILE = "task.toml"
"""What a search was asked for, in its run folder."""
CHANGEABLE = ("search_time", "trials", "target_accuracy", "batch_size", "learning_rate")
"""What a resumed search may have otherwise."""
MOVABLE = ("model", "weights", "data", "space")
"""Names that may be others when a search is resumed: files are moved, and what they hold is compared by content."""


class Task(Record):
    """One search. Paths and `${AUTOCOMPRESS_DATA}` in references are expanded when the file is read.

    search_time: how long the whole search may take (`"30m"`). batch: inputs a call of the deployed model; batch_size: examples a step of
    training.
    target_accuracy: a validation score to stop at: a share up to 1 where the score is accuracy, any number where the data has its own.
    from_run: folder of another search of the same model and data, to begin with what it has learned.
    """

    budget: tuple[str, ...] = ()
    model: str = DEMO_MODEL
    weights: str | None = None
    data: str = DEMO_DATA
    device: str = DEFAULT_DEVICE
    batch: Annotated[int, Field(ge=1, le=4096)] = 1
    search_time: str = "30m"
    trials: Annotated[int, Field(ge=1)] | None = None
    target_accuracy: Annotated[float, Field(allow_inf_nan=False)] | None = None
    space: str = "default"
    student: str | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    from_run: str | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if isinstance(value, (int, float)):
            raise UsageError(
                f"a budget needs a unit, but got {value}", hint='budget = "10ms", "0.5x" (of the baseline), "4MB" or "p95=10ms"'
            )
        return (value,) if isinstance(value, str) else value

    @field_validator("search_time", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        if isinstance(value, (int, float)):
            raise UsageError(f"a duration needs a unit, but got {value}", hint='search_time = "30m" or "90s"')
        return value

    @field_validator("budget")
    @classmethod
    def _parses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        Budget.parse(value) if value else None
        return value

    @property
    def limits(self) -> Budget:
        return Budget.parse(self.budget) if self.budget else Budget()

    @property
    def search_seconds(self) -> float:
        return parse_duration(self.search_time)

    @property
    def is_demo(self) -> bool:
        return self.model.startswith(DEMO)

    @property
    def demands_trust(self) -> dict[str, str]:
        """By field, what runs somebody's code when it is loaded, and devices elsewhere, which are sent the model, inputs and a token."""
        functions = {
            "model": names_function(self.model, (*MODEL_LIBRARIES, OBJECT)),
            "data": names_function(self.data, (*DATA_READERS, OBJECT)),
            "space": draws_itself(self.space) and not self.space.startswith(OBJECT),
            "student": self.student is not None and names_function(self.student, MODEL_LIBRARIES),
            "device": self.device.startswith(AGENT),
        }
        return {field: getattr(self, field) for field, demands in functions.items() if demands}

    def difference(self, other: Task) -> str | None:
        """The first field in which another task differs, so that their policies cannot share a run folder.

        How long to search and how to train is free; a budget and a device are the same in other words. What the model and the data are
        named is free too, since their contents are compared once they are loaded; so is where the file of a space is.
        """
        if self.is_demo != other.is_demo:
            return "model"
        if self.limits != other.limits:
            return "budget"
        if not same_device(self.device, other.device):
            return "device"
        if _place_free(self.space) != _place_free(other.space):
            return "space"
        return self._differs(other, [name for name in Task.model_fields if name not in (*CHANGEABLE, *MOVABLE, "budget", "device")])

    def other_subject(self, other: Task) -> str | None:
        """The first field in which another task differs, so that what it has learned of policies says nothing of them here.

        What the names of models, data and files stand for is compared by content: a run may have come from another machine.
        """
        if (draws_itself(self.space) or draws_itself(other.space)) and _place_free(self.space) != _place_free(other.space):
            return "space"
        return self._differs(other, ["batch", "student", *(["model"] if self.is_demo != other.is_demo else [])])

    def _differs(self, other: Task, fields: Iterable[str]) -> str | None:
        return next((name for name in fields if getattr(self, name) != getattr(other, name)), None)

    def absolute(self) -> Self:
        """The same task with paths from the root of the disk, so that it can be resumed in another folder.

        `student` stays as it is: it is part of every policy, and a policy is the same wherever it is kept.
        """
        own_file = self.space.endswith(".toml")
        return self.model_copy(
            update={
                "model": absolute_model(self.model),
                "weights": absolute_path(self.weights) if self.weights else None,
                "from_run": absolute_path(self.from_run) if self.from_run else None,
                "data": absolute_data(self.data),
                "space": absolute_path(self.space) if own_file else absolute_function(self.space),
            }
        )

    def to_toml(self) -> str:
        """The task as a file that `load_task` reads back."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.model_dump().items() if value is not None)

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> Self:
        """Validate; raises UsageError that names the key, with the nearest one for a mistyped key."""
        unknown = sorted(set(values) - set(cls.model_fields))
        if unknown:
            raise UsageError(f"unknown key {unknown[0]!r} in the task", hint=nearest(unknown[0], cls.model_fields))
        try:
            task = cls.model_validate(values)
        except ValidationError as error:
            raise UsageError(
                f"the task is not valid: {first_problem(error)}", hint="`autocompress search --help` says what each option takes"
            ) from None
        _ = task.search_seconds
        return task


def _place_free(space: str) -> str:
    """A space's name without the folder that its file lies in; what files of spaces hold is compared by content."""
    if draws_itself(space):
        file, colon, function = space.rpartition(":")
        return f"{Path(file).name}{colon}{function}"
    return ".toml" if space.endswith(".toml") else space


def same_device(one: str, other: str) -> bool:
    """Whether two references name one device, whatever they leave to be as usual."""
    return _device_of(one) == _device_of(other)


def _device_of(reference: str) -> tuple[str, dict[str, str]]:
    """The device's name, and its options with those that are usual."""
    name, options = parse_reference(reference)
    if name.startswith(AGENT) and ":" not in name.removeprefix(AGENT):
        name = f"{name}:{AGENT_PORT}"
    return name, {"threads": "1", "runtime": "onnxruntime", "precision": "f32"} | options


def load_task(path: Path | None, overrides: Mapping[str, object]) -> Task:
    """The task of a TOML file (or the demonstration's defaults) with `overrides` whose value is not None on top."""
    given = {key: value for key, value in overrides.items() if value is not None and value != ()}
    base = _read(path) if path is not None else {}
    values = base | given
    if "model" not in values:
        if values.get("data", DEMO_DATA) != DEMO_DATA:
            hint = "add --model file.py:function, or model = ... to the task file"
            raise UsageError("--data needs --model: the model of the demonstration reads nothing but digits", hint=hint)
        if "weights" in values:
            raise UsageError("--weights needs --model: the demonstration trains its own", hint="add --model file.py:function")
        values = {"batch": 32, "search_time": "4m"} | values
    elif "data" not in values:
        raise UsageError("a task with its own model needs data", hint="add --data imagefolder:DIR or data = ... to the task file")
    return Task.create(values)


def load_kept_task(run: Path, overrides: Mapping[str, object]) -> Task:
    """The task of a run folder, with `overrides` on top.

    Raises UsageError where there is none, and where it would run code, or send the model elsewhere, that neither `overrides` name nor a
    search of this user's: the folder may come from somebody else.
    """
    path = run / TASK_FILE
    if not path.is_file():
        raise UsageError(f"there is no search in {str(run)!r}", hint="give the run folder of a search")
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(
            f"{str(path)!r} is damaged: {error}",
            hint=f"front.json says what the task was; write it anew: autocompress search TASK.toml --resume --out {shlex.quote(str(run))}",
        ) from None
    task = load_task(path, overrides)
    unnamed = {field: value for field, value in task.demands_trust.items() if overrides.get(field) is None}
    from_within = Path.cwd().resolve().is_relative_to(run.resolve())  # where relative names would be looked for in it
    if unnamed and (from_within or not is_own_file(path)):
        named = " ".join(f"--{field} {shlex.quote(value)}" for field, value in unnamed.items())
        what, value = next(iter(unnamed.items()))
        raise UsageError(
            f"the {what} {value!r} is named by {str(path)!r}, which "
            + ("lies around this folder" if from_within and is_own_file(path) else "no search of yours on this machine has written"),
            hint=f"where you trust it, name it yourself: {named}",
        )
    return task


def find_task(
    path: Path | None, overrides: Mapping[str, object], *, out: Path | None, from_run: Path | None = None, resume: bool = False
) -> Task:
    """What a search is asked for: by a task file, else by the search that is resumed or learned from, with `overrides` on top.

    Raises UsageError where there is nothing to resume.
    """
    if resume and out is None:
        raise UsageError("--resume needs the folder of the search to continue", hint="add --out RUN")
    if path is None and resume and out is not None and (out / TASK_FILE).is_file():
        return load_kept_task(out, overrides)
    if path is None and from_run is not None:
        return load_kept_task(from_run, overrides)
    return load_task(path, overrides)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = "options such as --model need no file"
        raise UsageError(f"the task file {str(path)!r} cannot be read: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        raise UsageError(f"the task file {str(path)!r} is not UTF-8 text", hint="save it as UTF-8") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"the task file {str(path)!r} is not TOML: {error}", hint='strings need quotes: model = "file.py:function"'
        ) from None
    return {key: _expand(value, path) if isinstance(value, str) else value for key, value in values.items()}


def _expand(value: str, path: Path) -> str:
    marker = "${" + DATA_VARIABLE + "}"
    if marker in value and DATA_VARIABLE not in os.environ:
        raise UsageError(f"{path.name} reads {value!r}, but {DATA_VARIABLE} is not set", hint=f"export {DATA_VARIABLE}=FOLDER")
    return value.replace(marker, os.environ.get(DATA_VARIABLE, "")).replace("${HERE}", str(path.resolve().parent))


def _toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
