"""What a container may use, and which processors are measured, as files of the system tell."""

import math
import os

import pytest

from autocompress.system import machine


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes a file of the system."""
    monkeypatch.setattr(machine, "CONTROL", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpu")

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 6),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ({"cpu.max": "nonsense"}, 6),
    ],
)
def test_a_quota_limits_the_processors(system, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    for name, text in files.items():
        system(f"cgroup/{name}", text)
    assert machine.usable() == expected


def test_a_limit_on_memory_counts_but_for_files_that_are_only_cached(system):
    everything = machine.free_bytes()
    assert everything > 2**20
    system("cgroup/memory.max", "max")
    system("cgroup/memory.current", "1000")
    assert math.isclose(machine.free_bytes(), everything, rel_tol=0.5), "no limit"
    system("cgroup/memory.max", "5000")
    assert machine.free_bytes() == 4000
    system("cgroup/memory.stat", "active_file 7\ninactive_file 300")
    assert machine.free_bytes() == 4307
    system("cgroup/memory.current", "9000")
    assert machine.free_bytes() == 0


def test_measuring_stays_on_the_last_processors_where_all_are_alike(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert machine.fastest_cpus(1) == [3]
    assert machine.fastest_cpus(2) == [2, 3]
    assert machine.fastest_cpus(9) == [0, 1, 2, 3]


def test_fast_cores_are_measured_and_each_of_them_once(system, monkeypatch):
    """Two fast cores of two threads each, then two slow ones, as processors with cores of several kinds number them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    for cpu in range(6):
        system(f"cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq", "5000000" if cpu < 4 else "3800000")
        system(f"cpu/cpu{cpu}/topology/thread_siblings_list", {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}.get(cpu, str(cpu)))
    assert machine.fastest_cpus(1) == [3]
    assert machine.fastest_cpus(2) == [1, 3]
    assert machine.fastest_cpus(4) == [1, 3, 4, 5], "a slow core before half of a fast one"
    system("cpu/cpu4/cpu_capacity", "9000000")
    assert machine.fastest_cpus(1) == [4], "where the system ranks cores itself"
