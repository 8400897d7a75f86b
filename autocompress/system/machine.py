"""What this process may use of the machine, which in a container is less than there is. Standard library only: agents have it."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from pathlib import Path

CONTROL = Path("/sys/fs/cgroup")
"""What limits a container, as it sees it itself."""
CPUS = Path("/sys/devices/system/cpu")


def usable() -> int:
    """Logical processors: those that this process may run on, or as many as its quota is worth."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def is_running(process: int) -> bool:
    """Whether there is a process of this number, whoever has started it."""
    try:
        os.kill(process, 0)
    except OSError as error:  # somebody else's is running all the same
        return isinstance(error, PermissionError)
    return True


def free_bytes() -> int | None:
    """Memory that is free; None where the system does not say."""
    free = None
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    known = [n for n in (free, _allowed_bytes()) if n is not None]
    return min(known, default=None)


def fastest_cpus(n: int) -> list[int]:
    """Where to measure: one processor a core before any second one of it, the fastest cores first, and of these the last.

    The first serves most interrupts. Of processors with cores of several kinds the last are often the slowest.
    """
    threads, ranked = Counter[str](), list[tuple[int, int, int]]()
    for cpu in sorted(os.sched_getaffinity(0), reverse=True):
        core = _read(CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        ranked.append((threads[core], -_speed(cpu), -cpu))
        threads[core] += 1
    return sorted(-cpu for _, _, cpu in sorted(ranked)[:n])


def _speed(cpu: int) -> int:
    """Of a core beside the others; 0 where the system does not say."""
    known = (_number(CPUS / f"cpu{cpu}" / name) for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"))
    return next((value for value in known if value is not None), 0)


def _quota() -> float:
    """Processors that a container's share of time is worth; infinite where there is no limit."""
    limit, _, period = _read(CONTROL / "cpu.max").partition(" ")
    if limit.isdecimal() and period.isdecimal():
        return int(limit) / int(period)
    quota, every = _number(CONTROL / "cpu/cpu.cfs_quota_us"), _number(CONTROL / "cpu/cpu.cfs_period_us")
    return quota / every if quota is not None and every and quota > 0 else math.inf


def held_bytes() -> int | None:
    """Memory that this process has asked for, used or not, as limits count it; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmData:")).split()[1])
    return None


def _allowed_bytes() -> int | None:
    """Memory that a container may still take; None where there is no limit."""
    for most, taken, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit, used = _number(CONTROL / most), _number(CONTROL / taken)
        if limit is not None and used is not None:
            return max(0, limit - used + _cached_bytes(CONTROL / statistics))
    return None


def _cached_bytes(statistics: Path) -> int:
    """Of files, which are dropped before anything fails."""
    fields = (line.split() for line in _read(statistics).splitlines())
    return sum(int(field[1]) for field in fields if field[0] in ("active_file", "inactive_file") and field[1].isdecimal())


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def _read(path: Path) -> str:
    """A line that the system writes; empty where it does not."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
