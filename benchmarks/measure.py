"""Run something in a process of its own and say how long it took and how much memory it needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


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
