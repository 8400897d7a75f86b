"""What this machine's processor says of itself, as far as it decides how fast and how exact int8 runs."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_bf16", "asimd", "asimddp", "i8mm")
"""The instruction sets that matter here."""
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
BOARD = Path("/proc/device-tree/model")
MILLI = 1000
UNKNOWN = "unknown"
"""How an environment tells of what the system does not say."""
THERMAL = Path("/sys/class/thermal")
NO_TURBO, BOOST = Path("/sys/devices/system/cpu/intel_pstate/no_turbo"), Path("/sys/devices/system/cpu/cpufreq/boost")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def name() -> str:
    """The processor's name as the system tells it."""
    return _cpuinfo("model name") or _board() or platform.processor() or platform.machine()


def flags() -> frozenset[str]:
    """Instruction sets that Linux reports; empty elsewhere."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def listed_flags() -> list[str]:
    """Those of FLAGS that are here."""
    here = flags()
    return [flag for flag in FLAGS if flag in here]


def governor() -> str | None:
    """How the system sets the clock; None where it does not say (virtual machines)."""
    try:
        return GOVERNOR.read_text(encoding="ascii").strip()
    except OSError:
        return None


def turbo() -> str:
    """Whether the clock may rise above its nominal rate for a while: `"on"`, `"off"` or `"unknown"`."""
    for path, off in ((NO_TURBO, "1"), (BOOST, "0")):
        with contextlib.suppress(OSError):
            return "off" if path.read_text(encoding="ascii").strip() == off else "on"
    return UNKNOWN


def temperature() -> str:
    """Of the hottest sensor, such as `"54 C"`; `"unknown"` where there is none, as in virtual machines."""
    found = []
    for sensor in THERMAL.glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(sensor.read_text(encoding="ascii")) / MILLI)
    return f"{max(found):.0f} C" if found else UNKNOWN


def clock_warning(governor: str | None) -> str:
    """What to tell who measures where the clock follows the load; nothing where it is fixed, or the system does not say."""
    return "" if governor in (None, UNKNOWN, "performance") else f"the CPU governor is {governor!r}: latencies vary less with 'performance'"


def int8_saturates(here: frozenset[str]) -> bool:
    """Whether uint8 x int8 products are added in 16 bits: x86 processors without VNNI."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return is_x86 and not here & VNNI


def _board() -> str:
    """What boards with ARM processors call themselves, where these have no name of their own: "Raspberry Pi 4 Model B Rev 1.4"."""
    with contextlib.suppress(OSError):
        return BOARD.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    return ""


def resident_bytes(pid: int) -> int:
    """Memory that a process takes; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return 0


def _cpuinfo(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    return ""
