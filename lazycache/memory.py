"""What the machine really lets this process have: memory and CPUs, and budgets as shares of it.

Several things limit a process, and each is a `Bound`: physical memory, every control group
(version 1 or 2) from the process's own up to the top, what Slurm granted the job, the address
space (``ulimit -v``). The kernel or Slurm kills who passes one of the first three, and says
nothing before. psutil knows of physical memory only.

Where the numbers come from is a `Machine`; tests lay out their own in a folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import SizeError
from .sizes import parse_size

# Descriptors that are left to the rest of the process where files are opened by the hundred.
_OTHER_FILES = 128
# So many threads may open all that they want, where the limit can be raised for them.
_THREADS = 16


def _physical_memory() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _address_space_limit() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _workers() -> int:
    """How many processes as this one share its memory: 1 for a process that is no worker."""
    torch_info = getattr(sys.modules.get("torch.utils.data"), "get_worker_info", None)
    if torch_info is not None and (info := torch_info()) is not None:
        return max(1, int(info.num_workers))
    import multiprocessing

    if multiprocessing.parent_process() is None:
        return 1
    # joblib's loky, Pool and ProcessPoolExecutor tell a worker nothing of the others. Those that
    # its parent runs with the same Python are a fair measure.
    import psutil

    me = psutil.Process()
    count = max(1, _siblings(me), _most_workers())
    try:
        # A worker may run workers of its own: they share what is one worker's part.
        for process in me.parents():
            if _is_worker(process):
                count *= max(1, _siblings(process))
            elif not _is_helper(process):
                break
    except psutil.Error:  # ended meanwhile, or somebody else's
        pass
    return count


def _most_workers() -> int:
    """How many workers the ProcessPoolExecutor that runs this one may have, else 1.

    It starts them as calls come, so that the first would take themselves for all. The places in
    its queue of calls tell.
    """
    import multiprocessing

    module = sys.modules.get("concurrent.futures.process")
    queue = next(iter(getattr(multiprocessing.current_process(), "_args", ())), None)
    if module is None or type(queue) is not getattr(module, "_SafeQueue", None):
        return 1
    return int(getattr(queue, "_maxsize", 1)) - int(getattr(module, "EXTRA_QUEUED_CALLS", 1))


def _siblings(process: Any) -> int:
    """The children of its parent that run the same Python, this one too, but no helpers."""
    import psutil

    executable, parent = process.exe(), process.parent()
    count = 0
    for sibling in [] if parent is None else parent.children():
        try:
            count += sibling.exe() == executable and not _is_helper(sibling)
        except psutil.Error:  # ended meanwhile, a zombie, or somebody else's
            continue
    return count


def _is_helper(process: Any) -> bool:
    """Whether multiprocessing or loky keeps this process for itself, beside the workers."""
    command = str(process.cmdline())
    if "multiprocessing.forkserver" in command:
        return not _is_forked(process)  # the workers that it forks have its command
    return "resource_tracker" in command


def _is_worker(process: Any) -> bool:
    """Whether this process was started by multiprocessing or loky."""
    command = process.cmdline()
    return (
        "--multiprocessing-fork" in command or "popen_loky" in str(command) or _is_forked(process)
    )


def _is_forked(process: Any) -> bool:
    """Whether this process goes on with the program of its parent."""
    parent = process.parent()
    return (
        parent is not None
        and process.exe() == parent.exe()
        and process.cmdline() == parent.cmdline()
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the limits of this process are read from.

    ``root`` stands before ``/proc`` and ``/sys``. ``physical_memory`` gives the total and the
    available bytes; ``address_space_limit`` bytes, or None for no limit; ``affinity`` the CPUs
    this process may run on; ``workers`` how many processes as this one share the limits.
    """

    root: str = "/"
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    physical_memory: Callable[[], tuple[int, int]] = _physical_memory
    address_space_limit: Callable[[], int | None] = _address_space_limit
    affinity: Callable[[], int] = _affinity
    workers: Callable[[], int] = _workers


THIS_MACHINE = Machine()


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit and how much of it is in use, in bytes.

    Where the kernel says so, by all processes that share the limit; of Slurm's, and of the
    address space, by this process.
    """

    name: str
    limit: int
    used: int

    def room(self, cached: int = 0) -> int:
        """The limit less what is used by others than a cache that holds ``cached`` bytes."""
        return max(0, self.limit - max(0, self.used - cached))


def bounds(machine: Machine = THIS_MACHINE) -> list[Bound]:
    """All that limits the memory of this process now. Physical memory always does."""
    total, available = machine.physical_memory()
    found = [Bound("physical memory", total, total - available)]
    for group in _limited_groups(machine.root):
        limit = group.limit()
        if limit is not None:
            found.append(Bound(f"control group {group.folder}", limit, group.used()))
    slurm = _slurm_limit(machine.environ)
    address_space = machine.address_space_limit()
    if slurm is not None or address_space is not None:
        mapped, resident = _own_memory(machine.root)
        if slurm is not None:
            found.append(Bound("Slurm's memory for the job", slurm, resident))
        if address_space is not None:
            found.append(Bound("address space (ulimit -v)", address_space, mapped))
    return found


def machine_limit(cached: int = 0, machine: Machine = THIS_MACHINE) -> int:
    """The bytes that a cache may grow to, the ``cached`` bytes that it holds now included.

    The smallest, over all limits, of the limit less what is used outside the cache.
    """
    return min(bound.room(cached) for bound in bounds(machine))


def available_now(machine: Machine = THIS_MACHINE) -> int:
    """The bytes that can still be taken now before some limit is met. Some 30 µs."""
    return machine_limit(0, machine)


def resolve_budget(
    value: int | float | str, *, cached: int = 0, machine: Machine = THIS_MACHINE
) -> int:
    """The budget in bytes that ``value`` says.

    An int or a size as text ("4GiB") is itself. "50%", a float in (0, 1] and "auto" (50 %) are
    shares of `machine_limit`, divided among the worker processes (joblib, torch,
    multiprocessing, the tasks of a Slurm step) that share it. ``cached`` is what the cache holds
    already. Anything else is a `SizeError` that quotes the value and says what to write.
    """
    share = _as_share(value)
    if share is None:
        try:
            return parse_size(value)  # type: ignore[arg-type]  # it refuses what is no size
        except SizeError as refused:
            raise SizeError(
                f'{refused}; a budget can also be a share of the memory: "50%", 0.5 or "auto"'
            ) from None
    if not 0 < share <= 1:
        raise SizeError(
            f"{value!r} is not a budget: a share of the memory is over 0 and at most 1 (100%); "
            'write "50%", 0.5 or "auto", or bytes such as "4GiB"'
        )
    sharers = max(1, machine.workers()) * _slurm_tasks(machine.environ)
    return int(share * machine_limit(cached, machine)) // sharers


def is_share(value: object) -> bool:
    """Whether this budget is a share of the memory, and not bytes."""
    return _as_share(value) is not None


def _as_share(value: object) -> float | None:
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return 0.5
        if match := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?%", value.strip()):
            return float(match[1]) / 100
    return None


def usable_cpus(machine: Machine = THIS_MACHINE) -> int:
    """How many threads can run at once: at least 1.

    ``LAZYCACHE_THREADS`` decides if it is set (a `SizeError` names it if it is no whole number
    from 1 up). Else the smallest of the affinity, the control groups' CPU quotas, rounded down,
    and ``SLURM_CPUS_PER_TASK``.
    """
    wanted = machine.environ.get("LAZYCACHE_THREADS")
    if wanted is not None:
        if re.fullmatch("0*[1-9][0-9]{0,5}", wanted.strip()) is None:
            raise SizeError(
                f"LAZYCACHE_THREADS={wanted!r} is not a number of threads: set it to a whole "
                "number from 1 up, or unset it to use all CPUs that this process may use"
            )
        return int(wanted)
    counts = [machine.affinity(), *_cpu_quotas(machine.root)]
    if slurm := _whole(machine.environ.get("SLURM_CPUS_PER_TASK")):
        counts.append(slurm)
    return max(1, min(counts))


# --- what this process uses ----------------------------------------------------------------------

# glibc's name for the number of its arenas, and as many as threads that decode at once need.
_M_ARENA_MAX = -8
_FEW_ARENAS = 2


def openable_files(wanted: int) -> int:
    """How many of ``wanted`` files may be open at once, with the soft limit raised for them.

    Some more than are open now are left to the rest of the process.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = _open_files() + _OTHER_FILES
    # Other threads may be about to open as many.
    raised = _THREADS * wanted + others
    if soft == resource.RLIM_INFINITY or raised <= soft:
        return wanted
    raised = raised if hard == resource.RLIM_INFINITY else min(raised, hard)
    if raised > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):  # not allowed here
            pass
    return max(1, min(wanted, soft - others))


def _open_files() -> int:
    """How many files this process has open, where the system tells."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def _spare_address_space() -> None:
    """Where the address space is limited, keep the C allocator from reserving much of it.

    glibc gives each thread that allocates an arena of 64 MiB of addresses, for good: the threads
    that read ahead would leave too few of them for the data.
    """
    if sys.platform.startswith("linux") and _address_space_limit() is not None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # another C library than glibc has no arenas to spare
            mallopt(_M_ARENA_MAX, _FEW_ARENAS)


_spare_address_space()


def _own_memory(root: str) -> tuple[int, int]:
    """Bytes of address space and of resident memory."""
    pages = _read(root, "proc/self/statm").split()
    if len(pages) >= 2:
        size = os.sysconf("SC_PAGE_SIZE")
        return int(pages[0]) * size, int(pages[1]) * size
    import psutil

    memory = psutil.Process().memory_info()
    return memory.vms, memory.rss


def _read(root: str, *path: str) -> str:
    """The text of a file of the kernel's, "" if it isn't there."""
    try:
        with open(os.path.join(root, *path), "rb", buffering=0) as file:
            return os.fsdecode(file.read())
    except OSError:
        return ""


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,20}", text) else None


# --- Slurm ---------------------------------------------------------------------------------------


_SLURM_SHIFT = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}


def _slurm_limit(environ: Mapping[str, str]) -> int | None:
    per_node = _slurm_memory(environ.get("SLURM_MEM_PER_NODE"))
    if per_node:
        return per_node
    per_cpu = _slurm_memory(environ.get("SLURM_MEM_PER_CPU"))
    cpus = _whole(environ.get("SLURM_CPUS_ON_NODE")) or _whole(environ.get("SLURM_CPUS_PER_TASK"))
    return per_cpu * cpus if per_cpu and cpus else None


def _slurm_memory(text: str | None) -> int | None:
    """Bytes of Slurm's MiB, or with a letter as in ``--mem=4G``; 0 is all that the node has."""
    match = re.fullmatch("([0-9]{1,15})([KMGT]?)", text or "")
    return int(match[1]) << _SLURM_SHIFT[match[2]] if match else None


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """The tasks of this step on a node; of "4(x2),1" (two nodes with 4, one with 1) the most."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return max([1, *(int(count) for count in re.findall(r"(?:^|,)([0-9]{1,6})", text))])


# --- control groups ------------------------------------------------------------------------------

# Version 1 writes "no limit" as the largest number of pages.
_NO_LIMIT = 1 << 60

# Of the page cache: what was not used lately, what was, and how much of it all is mapped.
_STATS_V1 = ("total_inactive_file", "total_active_file", "total_mapped_file")
_STATS_V2 = ("inactive_file", "active_file", "file_mapped")


@dataclass(frozen=True, slots=True)
class _Group:
    """The memory of one control group."""

    folder: str
    version: int

    def limit(self) -> int | None:
        if self.version == 1:
            names = ["memory.limit_in_bytes"]
        else:
            # Over memory.high a process isn't killed, but slowed down to a crawl.
            names = ["memory.max", "memory.high"]
        limits = [_whole(_read(self.folder, name).strip()) for name in names]
        return min((n for n in limits if n is not None and n < _NO_LIMIT), default=None)

    def used(self) -> int:
        """Bytes that can't be taken back: less the page cache, but for what is mapped.

        The kernel drops page cache before it kills. A mapped part is mostly the programs' code.
        """
        if self.version == 1:
            usage, names = "memory.usage_in_bytes", _STATS_V1
        else:
            usage, names = "memory.current", _STATS_V2
        used = _whole(_read(self.folder, usage).strip()) or 0
        found: dict[str, int] = {}
        for line in _read(self.folder, "memory.stat").splitlines():
            name, _, number = line.partition(" ")
            if name in names:
                found[name] = _whole(number) or 0
        inactive, active, mapped = (found.get(name) for name in names)
        # Lately used pages count as well where it is known how many of them are mapped.
        reclaimable = inactive or 0
        if active is not None and mapped is not None:
            reclaimable += max(0, active - mapped)
        return max(0, used - reclaimable)


@lru_cache(maxsize=16)
def _limited_groups(root: str) -> tuple[_Group, ...]:
    """This process's group and the groups around it, those with a limit.

    Found once, since `available_now` is asked often; the limits themselves are read anew.
    """
    groups = (_Group(folder, version) for folder, version in _folders(root, "memory"))
    return tuple(group for group in groups if group.limit() is not None)


def _cpu_quotas(root: str) -> Iterator[int]:
    for folder, version in _folders(root, "cpu"):
        if version == 1:
            texts = [_read(folder, name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        else:
            texts = _read(folder, "cpu.max").split()
        numbers = [_whole(text.strip()) for text in texts]
        match numbers:
            case [int(quota), int(period)] if quota and period:
                yield quota // period


def _folders(root: str, controller: str) -> Iterator[tuple[str, int]]:
    """The folders of this process's groups, innermost first, with the version of each."""
    for line in _read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        top, names = _locate(root, controller, version, path)
        for depth in range(len(names), -1, -1):
            yield os.path.join(top, *names[:depth]), version


def _locate(root: str, controller: str, version: int, path: str) -> tuple[str, list[str]]:
    """The folder where a hierarchy is mounted, and the way from it to the group ``path``.

    A container may see its own group as the top of the mount, or a path that leads nowhere in
    it: the mount itself is then the innermost group to be seen.
    """
    mounts = list(_mounts(root, controller, version))
    if not mounts:
        mounts = [("/sys/fs/cgroup" if version == 2 else f"/sys/fs/cgroup/{controller}", "/")]
    tops = [os.path.join(root, mount.lstrip("/")) for mount, _ in mounts]
    names = _names(path)
    for top, (_, mounted) in zip(tops, mounts, strict=True):
        above = _names(mounted)
        inside = names[len(above) :]
        visible = names[: len(above)] == above and ".." not in names
        if visible and os.path.isdir(os.path.join(top, *inside)):
            return top, inside
    return tops[0], []


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


def _mounts(root: str, controller: str, version: int) -> Iterator[tuple[str, str]]:
    """Where a hierarchy is mounted, and which group of it is the top there."""
    for line in _read(root, "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        fields, kinds = place.split(), kind.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if version == 2:
            wanted = kinds[0] == "cgroup2"
        else:
            wanted = kinds[0] == "cgroup" and controller in kinds[2].split(",")
        if wanted:
            yield _unescape(fields[4]), _unescape(fields[3])


def _unescape(path: str) -> str:
    """The kernel writes a space in a path as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
