"""Run something in a process of its own and say how long it took and how much memory it needed.

`run` measures work inside a Python process, imports left out; `whole` measures a whole process,
whatever it is. `interleaved` runs contenders in turn, so that all meet the same machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")


class Measured(NamedTuple):
    """Seconds of work, the most resident bytes during it, those before it, and what it told."""

    seconds: float
    peak: int
    start: int
    told: Any


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the system doesn't tell {field}")


def run(module: str, *arguments: str) -> Measured:
    """Run ``python -m module arguments`` that ends with `report`."""
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    return Measured(*json.loads(process.stdout.splitlines()[-1]))


def report(work: Callable[[], Any]) -> None:
    """Do ``work`` and print its `Measured` as the last line of standard output."""
    start = resident("VmRSS")
    began = time.perf_counter()
    told = work()
    seconds = time.perf_counter() - began
    print(json.dumps(Measured(seconds, resident("VmHWM"), start, told)))


class Whole(NamedTuple):
    """Seconds of a whole process, of its processors (user and system), its most resident bytes.

    ``told`` is what it wrote to standard output.
    """

    seconds: float
    cpu: float
    peak: int
    told: str


# A process begins with the peak of the one that started it, so that has to be a small one.
_LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(process, 0)
seconds = time.perf_counter() - began
processors = used.ru_utime + used.ru_stime
print(json.dumps([seconds, processors, 1024 * used.ru_maxrss]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def whole(*command: str) -> Whole:
    """Run ``command`` and measure all of it; `CalledProcessError` if it fails."""
    launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    process = subprocess.run(launched, stdout=subprocess.PIPE, check=True, text=True)
    told, _, last = process.stdout.rstrip().rpartition("\n")
    seconds, cpu, peak = json.loads(last)
    return Whole(seconds, cpu, peak, told)


def interleaved(contenders: Mapping[str, Callable[[], _T]], rounds: int) -> dict[str, list[_T]]:
    """What each contender gave in each round; in each round they run one after the other."""
    found: dict[str, list[_T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender())
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of what theirs took over what ours took."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
