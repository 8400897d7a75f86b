"""What a search would do, without doing it."""

from __future__ import annotations

from typing import Any

import numpy as np

from autocompress.budget import Budget
from autocompress.search_space import suggest_of, with_default_distillation
from autocompress.setup.demo_size import of_fitting_size
from autocompress.setup.loading import load
from autocompress.suggesters import LevelSuggester
from autocompress.system.progress import Progress, counting
from autocompress.task import Task


def dry_run(task: Task, progress: Progress) -> dict[str, Any]:
    """What a search would do, without doing it: sizes of the space, budget, time, three policies in words."""
    task = of_fitting_size(task, task.from_run)
    found = task.absolute()
    loaded = load(found, tick=counting(progress))
    graph, data = loaded.graphs[task.student], loaded.data
    suggest = suggest_of(found, loaded.graphs, loaded.device.profile)
    generator = np.random.default_rng(task.seed)
    drawn = LevelSuggester(generator)
    suggest(drawn)
    policies = [with_default_distillation(suggest)(LevelSuggester(generator)) for _ in range(3)]
    return {
        "task": task.model_dump(mode="json"),
        "budget": Budget.parse(task.budget).in_words() if task.budget else "none",
        "search_time_s": task.search_seconds,
        "dimensions": len(drawn.params),
        "groups": len(graph.groups),
        "blocks": len(graph.blocks),
        "layers": len(graph.layers),
        "frozen": len(graph.frozen),
        "first_policies": [policy.in_words() for policy in policies],
        "train": len(data.train),
        "val": len(data.val),
        "test": len(data.test),
    } | ({"notes": list(loaded.notes)} if loaded.notes else {})
