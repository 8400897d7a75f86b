"""What a search keeps beside its policies, so that it can be resumed: each note by its name in the study, with what is kept there."""

from __future__ import annotations

from enum import StrEnum


class Note(StrEnum):
    """A name among the study's attributes. Values are JSON; a note that was never made is None."""

    # -- what the search is of
    TASK = "task"
    """The task, as `Task` in JSON."""
    CONTENTS = "contents"
    """Digests of what its names stand for (`loading.contents`)."""
    MACHINE = "machine"
    """What latencies depend on (`devices.base.identity`)."""
    TAKEN_OVER = "taken_over"
    """What came from another search (`records.TakenOver`)."""

    # -- what must stay as it was when the search began
    CALIBRATION_INPUTS = "calibration_inputs"
    """Number of inputs that int8 ranges are fitted to."""
    VAL_EXAMPLES, TEST_EXAMPLES = "val_examples", "test_examples"
    """Numbers of examples that score."""
    DIMENSIONS_FIRST = "dimensions_first"
    """True where dimensions were appraised alone, so that what is foreseen of policies is what these lose."""

    # -- how far it has come
    ELAPSED_S, SPENT_S = "elapsed_s", "spent_s"
    """Seconds that it took so far; and by activity."""
    UNTRAINED = "untrained"
    """What networks took that were measured untrained: pairs of a policy and of seconds in units of the original's."""
    PROGRESS = "progress"
    """Hypervolume and best score so far (`results.ProgressPoint`, a list)."""
    ORIGINAL = "original"
    """Latency and scores of the original, as they were measured last."""
    PER_EXAMPLE_S = "per_example_s"
    """Seconds that the original's file takes to answer one example."""
    FULL_RUNG = "full_rung"
    """What limited the rungs below when the search came to its last one: time, trials, target."""

    # -- what it was doing, should it be killed
    AT_WORK = "at_work"
    """The policy that is worked on, and how."""
    KILLED = "killed"
    """All that was worked on when the search was killed, a list."""
    PROBING = "probing"
    """Batch sizes of the training steps that are tried to see what one takes: one entry for each time that the process died over it."""
