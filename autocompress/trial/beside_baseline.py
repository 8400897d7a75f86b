"""Latencies of files beside the original's, measured in turns, with every sample kept beside the file that it is of."""

from __future__ import annotations

import csv
import datetime
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from autocompress.budget import Budget
from autocompress.devices.timing import MOST_DRIFT
from autocompress.records import FEWEST_FOR_TAIL, Measurement, Prediction
from autocompress.setup.setting import Setting
from autocompress.system.run_folder import writing
from autocompress.units import format_duration

SECONDS_EACH = 0.5
"""Of measuring a file in a search: half of what a figure deserves, since the front is measured again, for longer, at the end."""
LONGER = 4.0
"""Times as long a file is measured whose interval reaches beyond the budget: half as wide as it is then."""
MOST_SURPRISE = 10.0
"""Times, or a part of, what was predicted: more is no error of prediction."""
DRIFT_RETRIES = 3
DRIFT_PAUSE_S = 1.0
SAMPLES = "latency.csv"
COLUMNS = ("time", "file", "round", "seconds")


def measure_beside_baseline(
    setting: Setting, paths: Sequence[Path], *, seconds_each: float = SECONDS_EACH, until: float = math.inf
) -> list[Measurement]:
    """Latencies of the baseline and of files, interleaved; where the baseline is not what it was lately, wait and measure again.

    Measurements whose baseline stays away from that are flagged noisy: they cannot be compared with others. Lately is the median of the
    last times, so that one odd measurement is outvoted, whether it was the first or not. Nothing is measured again after `until`.
    """
    with setting.ledger.spend("measure"):
        for attempt in range(DRIFT_RETRIES):
            begun = time.monotonic()
            expected = setting.recent_baseline.median
            baseline, *others = _measured(setting, paths, seconds_each)
            setting.baseline_history.append(baseline)
            drift = baseline.median / expected - 1
            if abs(drift) <= MOST_DRIFT:
                return [baseline, *(latency.beside(baseline) for latency in others)]
            now = time.monotonic()
            if attempt == DRIFT_RETRIES - 1 or now + DRIFT_PAUSE_S + (now - begun) > until:
                break
            time.sleep(DRIFT_PAUSE_S)
        reason = f"the baseline beside it took {100 * drift:+.0f} % of its time"
        return [baseline, *(latency.beside(baseline).mistrusted(reason) for latency in others)]


def measure_within(limits: Budget, setting: Setting, path: Path, size_bytes: int, predicted: Prediction | None = None) -> Measurement:
    """Latency of a file beside the baseline: for so long that a budget's percentile is known, and longer where noise is over it."""
    seconds = seconds_for(limits, setting.recent_baseline.median, SECONDS_EACH)
    _, latency = measure_beside_baseline(setting, [path], seconds_each=seconds)
    if limits.leaves_open(latency, size_bytes):
        _, latency = measure_beside_baseline(setting, [path], seconds_each=LONGER * seconds)
    return believable(latency, predicted)


def believable(latency: Measurement, predicted: Prediction | None) -> Measurement:
    """Mistrusted where it is many times what was predicted: a device may have told other units, or have run something else."""
    if predicted is None or 1 / MOST_SURPRISE < latency.median / predicted.value < MOST_SURPRISE:
        return latency
    return latency.mistrusted(f"it was predicted to take {format_duration(predicted.value)}")


def seconds_for(limits: Budget, original_s: float, usual: float) -> float:
    """Of measuring a file beside an original that takes `original_s`: for a budget of the 95th percentile so long that this is known."""
    return max(usual, FEWEST_FOR_TAIL * original_s) if limits.p95_s is not None else usual


def _measured(setting: Setting, paths: Sequence[Path], seconds_each: float) -> list[Measurement]:
    """The baseline and files in turns; their samples are written, and not carried any further."""
    baseline, *others = setting.device.measure([setting.baseline.path, *paths], seconds_each=seconds_each)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for path, latency in zip(paths, others, strict=True):
        if latency.samples:  # not every device tells them
            _keep_samples(path, now, {"original": baseline, path.name: latency})
    return [latency.model_copy(update={"samples": ()}) for latency in (baseline, *others)]


def _keep_samples(path: Path, now: str, latencies: dict[str, Measurement]) -> None:
    """Append the samples to a table beside the file; a file that is measured again, as the front is at the end, has all of them."""
    target, flags = path.parent / SAMPLES, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link leads out of the folder
    with writing(target), os.fdopen(os.open(target, flags, 0o644), "a", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        if not os.fstat(file.fileno()).st_size:
            table.writerow(COLUMNS)
        for name, latency in latencies.items():
            table.writerows((now, name, number, f"{s:.4g}") for number, samples in enumerate(latency.samples) for s in samples)
