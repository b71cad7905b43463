"""The limits of machines laid out as files, and budgets as shares of them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazycache import memory
from lazycache.errors import SizeError
from lazycache.memory import (
    Bound,
    Machine,
    available_now,
    bounds,
    machine_limit,
    resolve_budget,
    usable_cpus,
)

MIB, GIB = 1 << 20, 1 << 30
PAGE = os.sysconf("SC_PAGE_SIZE")
V1_NO_LIMIT = 9223372036854771712

MOUNT_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = (
    "31 30 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "32 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:29 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
)
MOUNT_HYBRID = MOUNT_V1 + "34 31 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"

Lay = Callable[..., Machine]


@pytest.fixture
def lay(tmp_path: Path) -> Lay:
    """Make a machine of 64 GiB, 60 of them free, with 32 CPUs, and these files."""

    def lay(files: dict[str, object] | None = None, **changes: Any) -> Machine:
        for name, content in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}")
        machine = Machine(
            root=str(tmp_path),
            environ={},
            physical_memory=lambda: (64 * GIB, 60 * GIB),
            address_space_limit=lambda: None,
            affinity=lambda: 32,
            workers=lambda: 1,
        )
        return replace(machine, **changes)

    return lay


def v2(
    group: str, *, limit: object = "max", high: object = "max", used: int, inactive: int = 0
) -> dict[str, object]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file 3\n",
    }


def v1(group: str, *, limit: int = V1_NO_LIMIT, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 1\ninactive_file 99\ntotal_inactive_file {inactive}\n",
    }


def on_v2(group: str) -> dict[str, object]:
    return {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": MOUNT_V2}


def on_v1(group: str) -> dict[str, object]:
    return {
        "proc/self/cgroup": f"9:name=systemd:/x\n6:cpu,cpuacct:{group}\n4:memory:{group}\n",
        "proc/self/mountinfo": MOUNT_V1,
    }


# --- the machine's limit -------------------------------------------------------------------------


def test_without_other_limits_it_is_what_physical_memory_has_left(lay: Lay) -> None:
    machine = lay()
    assert machine_limit(machine=machine) == 60 * GIB
    assert available_now(machine) == 60 * GIB


def test_what_the_cache_holds_is_not_counted_against_it(lay: Lay) -> None:
    machine = lay(on_v2("/job") | v2("/job", limit=8 * GIB, used=6 * GIB))
    assert machine_limit(machine=machine) == 2 * GIB
    assert machine_limit(5 * GIB, machine) == 7 * GIB
    # Reserved and not yet touched: never more than the whole limit.
    assert machine_limit(7 * GIB, machine) == 8 * GIB


def test_a_limit_already_passed_leaves_nothing(lay: Lay) -> None:
    machine = lay(on_v2("/job") | v2("/job", limit=2 * GIB, used=3 * GIB))
    assert available_now(machine) == 0
    assert machine_limit(2 * GIB, machine) == GIB


@given(*[st.integers(0, 2**40)] * 3)
def test_room_is_never_negative_nor_over_the_limit(limit: int, used: int, cached: int) -> None:
    bound = Bound("some limit", limit, used)
    assert 0 <= bound.room(cached) <= limit
    assert bound.room(cached) >= bound.room()


def test_page_cache_of_files_read_once_counts_as_free(lay: Lay) -> None:
    machine = lay(on_v2("/job") | v2("/job", limit=8 * GIB, used=7 * GIB, inactive=6 * GIB))
    assert available_now(machine) == 7 * GIB


def test_v2_takes_the_lower_of_max_and_high(lay: Lay) -> None:
    machine = lay(on_v2("/job") | v2("/job", limit=8 * GIB, high=4 * GIB, used=GIB))
    assert available_now(machine) == 3 * GIB


def test_v2_takes_the_tightest_of_all_groups_around_the_process(lay: Lay) -> None:
    machine = lay(
        on_v2("/kube.slice/pod.slice/box")
        | v2("/kube.slice/pod.slice/box", limit=10 * GIB, used=2 * GIB)
        | v2("/kube.slice/pod.slice", used=2 * GIB)
        # The neighbours fill the slice, not the process's own group.
        | v2("/kube.slice", limit=16 * GIB, used=15 * GIB)
    )
    assert available_now(machine) == GIB
    assert [bound.name.rpartition("/")[2] for bound in bounds(machine)[1:]] == ["box", "kube.slice"]


def test_v2_without_any_limit_leaves_physical_memory(lay: Lay) -> None:
    machine = lay(on_v2("/user.slice/session") | v2("/user.slice/session", used=GIB))
    assert len(bounds(machine)) == 1


def test_v1_subtracts_the_inactive_files_of_the_whole_subtree(lay: Lay) -> None:
    group = v1("/docker/abc", limit=6 * GIB, used=5 * GIB, inactive=2 * GIB)
    machine = lay(on_v1("/docker/abc") | group | v1("", used=50 * GIB))
    assert available_now(machine) == 3 * GIB


def test_v1_without_a_limit_leaves_physical_memory(lay: Lay) -> None:
    machine = lay(on_v1("/user") | v1("/user", used=GIB) | v1("", used=GIB))
    assert len(bounds(machine)) == 1


def test_v1_finds_the_limit_of_the_slurm_job_above_the_task(lay: Lay) -> None:
    job = "/slurm/uid_1000/job_42"
    machine = lay(
        on_v1(f"{job}/step_0/task_0")
        | v1(f"{job}/step_0/task_0", used=GIB)
        | v1(f"{job}/step_0", limit=24 * GIB, used=2 * GIB)
        | v1(job, limit=24 * GIB, used=9 * GIB)
        | v1("/slurm/uid_1000", used=9 * GIB)
        | v1("/slurm", used=40 * GIB)
        | v1("", used=41 * GIB)
    )
    assert available_now(machine) == 15 * GIB


def test_v2_finds_the_limit_of_the_slurm_job_above_the_task(lay: Lay) -> None:
    job = "/system.slice/slurmstepd.scope/job_42"
    machine = lay(
        on_v2(f"{job}/step_0/user/task_0")
        | v2(f"{job}/step_0/user/task_0", used=GIB)
        | v2(job, limit=24 * GIB, used=4 * GIB)
    )
    assert available_now(machine) == 20 * GIB


def test_hybrid_machines_are_limited_by_their_v1_memory_controller(lay: Lay) -> None:
    machine = lay(
        on_v1("/job")
        | {
            "proc/self/cgroup": "4:memory:/job\n1:name=systemd:/s\n0::/s\n",
            "proc/self/mountinfo": MOUNT_HYBRID,
            "sys/fs/cgroup/unified/s/cgroup.procs": "",
        }
        | v1("/job", limit=3 * GIB, used=GIB)
    )
    assert available_now(machine) == 2 * GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../../elsewhere"])
def test_in_a_container_the_top_of_the_mount_is_the_group(lay: Lay, path: str) -> None:
    others = {"sys/elsewhere/memory.max": 5, "sys/fs/cgroup/docker/memory.max": 5}
    machine = lay(on_v2(path) | v2("", limit=4 * GIB, used=GIB) | others)
    assert available_now(machine) == 3 * GIB


def test_a_mount_of_a_part_of_the_tree_is_entered_below_that_part(lay: Lay) -> None:
    mounted = MOUNT_V1.replace("0:29 / ", "0:29 /docker/abc ")
    machine = lay(
        on_v1("/docker/abc/inner")
        | {"proc/self/mountinfo": mounted}
        | v1("/inner", limit=2 * GIB, used=GIB)
        | v1("", limit=5 * GIB, used=2 * GIB)
    )
    assert available_now(machine) == GIB
    assert len(bounds(machine)) == 3


def test_of_several_mounts_the_one_that_shows_the_group_is_taken(lay: Lay) -> None:
    elsewhere = "29 23 0:26 /other /mnt/other rw - cgroup2 cgroup2 rw\n"
    machine = lay(
        on_v2("/job")
        | {"proc/self/mountinfo": elsewhere + MOUNT_V2, "mnt/other/memory.max": "5"}
        | v2("/job", limit=4 * GIB, used=GIB)
    )
    assert available_now(machine) == 3 * GIB


def test_groups_may_be_mounted_anywhere_under_any_name(lay: Lay) -> None:
    machine = lay(
        {
            "proc/self/cgroup": "0::/a b\n",
            "proc/self/mountinfo": r"30 23 0:26 / /my\040groups rw - cgroup2 none rw" + "\n",
            "my groups/a b/memory.max": 2 * GIB,
            "my groups/a b/memory.current": GIB,
        }
    )
    assert available_now(machine) == GIB


@pytest.mark.parametrize("mountinfo", [None, "", "garbage\n", "1 2 3 - x\n"])
def test_without_a_list_of_mounts_the_usual_places_are_tried(
    lay: Lay, mountinfo: str | None
) -> None:
    files = {"proc/self/cgroup": "4:memory:/job\n0::/job\n"}
    if mountinfo is not None:
        files["proc/self/mountinfo"] = mountinfo
    assert available_now(lay(files | v1("/job", limit=3 * GIB, used=GIB))) == 2 * GIB


def test_limits_and_use_are_read_anew_each_time(lay: Lay) -> None:
    machine = lay(on_v2("/job") | v2("/job", limit=8 * GIB, used=GIB))
    assert available_now(machine) == 7 * GIB
    lay(v2("/job", limit=4 * GIB, used=3 * GIB))
    assert available_now(machine) == GIB
    lay(v2("/job", limit="max", used=3 * GIB))
    assert available_now(machine) == 60 * GIB


def test_a_full_machine_bounds_a_group_with_room(lay: Lay) -> None:
    files = on_v2("/job") | v2("/job", limit=32 * GIB, used=GIB)
    machine = lay(files, physical_memory=lambda: (64 * GIB, GIB))
    assert machine_limit(machine=machine) == GIB
    assert machine_limit(3 * GIB, machine) == 4 * GIB


# --- Slurm and ulimit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "limit"),
    [
        ({"SLURM_MEM_PER_NODE": "24576"}, 24 * GIB),
        ({"SLURM_MEM_PER_NODE": "24G"}, 24 * GIB),
        ({"SLURM_MEM_PER_NODE": "512M"}, 512 * MIB),
        ({"SLURM_MEM_PER_NODE": "524288K"}, 512 * MIB),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "6"}, 12 * GIB),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_PER_TASK": "3"}, 6 * GIB),
        (
            {
                "SLURM_MEM_PER_CPU": "2048",
                "SLURM_CPUS_ON_NODE": "6",
                "SLURM_CPUS_PER_TASK": "3",
            },
            12 * GIB,
        ),
        ({"SLURM_MEM_PER_NODE": "0"}, None),  # --mem=0: all that the node has
        ({"SLURM_MEM_PER_NODE": "plenty"}, None),
        ({"SLURM_MEM_PER_CPU": "2048"}, None),
        ({}, None),
    ],
)
def test_slurm_limits_the_process_by_what_the_job_was_granted(
    lay: Lay, environ: dict[str, str], limit: int | None
) -> None:
    pages = {"proc/self/statm": f"{3 * GIB // PAGE} {GIB // PAGE} 7 8 0 9 0\n"}
    machine = lay(pages, environ=environ)
    assert available_now(machine) == (60 * GIB if limit is None else max(0, limit - GIB))


def test_ulimit_bounds_the_address_space(lay: Lay) -> None:
    pages = {"proc/self/statm": f"{3 * GIB // PAGE} {GIB // PAGE} 7 8 0 9 0\n"}
    machine = lay(pages, address_space_limit=lambda: 5 * GIB)
    assert available_now(machine) == 2 * GIB
    assert machine_limit(GIB, machine) == 3 * GIB


def test_without_proc_the_process_is_measured_otherwise(lay: Lay) -> None:
    machine = lay(address_space_limit=lambda: 1 << 60)
    (bound,) = (bound for bound in bounds(machine) if bound.name.startswith("address"))
    assert 0 < bound.used < 1 << 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v as on Linux")
def test_the_real_ulimit_is_seen() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
        "from lazycache.memory import bounds\n"
        "print([b.limit for b in bounds() if b.name.startswith('address')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"[{1 << 40}]"


def test_this_machine_has_limits_of_some_sense() -> None:
    total = psutil.virtual_memory().total
    assert 0 < available_now() <= total
    assert available_now() <= machine_limit(GIB) + 256 * MIB
    assert 1 <= usable_cpus(replace(memory.THIS_MACHINE, environ={})) <= (os.cpu_count() or 1)


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (5, 5),
        (0, 0),
        (1, 1),
        (np.int32(7), 7),
        ("4GiB", 4 * GIB),
        ("8 GB", 8 * 10**9),
        ("1000", 1000),
        ("auto", 30 * GIB),
        ("Auto", 30 * GIB),
        ("50%", 30 * GIB),
        ("12.5 %", 15 * GIB // 2),
        ("100%", 60 * GIB),
        (0.5, 30 * GIB),
        (1.0, 60 * GIB),
        (np.float32(0.25), 15 * GIB),
    ],
)
def test_a_budget_is_bytes_or_a_share_of_the_limit(lay: Lay, value: Any, budget: int) -> None:
    resolved = resolve_budget(value, machine=lay())
    assert resolved == budget
    assert type(resolved) is int


@pytest.mark.parametrize(
    "value",
    [
        "4 bananas",
        "-1GiB",
        "0.8x",
        "0.8",
        "4G",
        "",
        "%",
        "0%",
        "101%",
        "-5%",
        "1e1%",
        "half",
        -5,
        0.0,
        -0.5,
        1.5,
        float("nan"),
        float("inf"),
        True,
        None,
        [1],
    ],
)
def test_what_is_no_budget_is_refused_with_what_to_write(lay: Lay, value: Any) -> None:
    with pytest.raises(SizeError) as refused:
        resolve_budget(value, machine=lay())
    assert repr(value) in str(refused.value)
    for example in ('"50%"', '"auto"', "iB"):
        assert example in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_share_counts_what_the_cache_already_holds(lay: Lay) -> None:
    machine = lay(on_v2("/job") | v2("/job", limit=8 * GIB, used=6 * GIB))
    assert resolve_budget("auto", machine=machine) == GIB
    assert resolve_budget("auto", cached=4 * GIB, machine=machine) == 3 * GIB


def test_workers_share_what_is_a_share_and_not_what_is_bytes(lay: Lay) -> None:
    machine = lay(workers=lambda: 4)
    assert resolve_budget("auto", machine=machine) == 30 * GIB // 4
    assert resolve_budget(0.5, machine=machine) == 30 * GIB // 4
    assert resolve_budget("4GiB", machine=machine) == 4 * GIB


@pytest.mark.parametrize(("tasks", "sharers"), [("8", 8), ("2(x3),1", 2), ("1,4(x2)", 4), ("", 1)])
def test_the_tasks_of_a_slurm_step_share_the_memory_of_the_job(
    lay: Lay, tasks: str, sharers: int
) -> None:
    machine = lay(environ={"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert resolve_budget("auto", machine=machine) == 30 * GIB // sharers


# --- workers -------------------------------------------------------------------------------------


def test_a_process_that_is_no_worker_shares_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", None)  # whom else its parent runs is not even asked
    assert memory._workers() == 1


def count_workers(barrier: Any, answers: Any) -> None:
    barrier.wait(60)  # all have been started
    answers.put(memory._workers())
    barrier.wait(60)  # none has ended


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing_workers_count_each_other(method: str) -> None:
    context = multiprocessing.get_context(method)
    barrier, answers = context.Barrier(3), context.Queue()
    workers = [context.Process(target=count_workers, args=(barrier, answers)) for _ in range(3)]
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    try:
        for worker in workers:
            worker.start()
        counts = [answers.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join(60)
    finally:
        for other in others:
            other.kill()
            other.wait()
    # Other tests' helper processes, such as the fork server, may be children of ours too.
    assert all(3 <= count <= 4 for count in counts)


def test_joblib_workers_count_each_other() -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="loky"):
        counts = joblib.Parallel(n_jobs=2)(joblib.delayed(memory._workers)() for _ in range(4))
    joblib.externals.loky.get_reusable_executor().shutdown(wait=True)
    assert all(2 <= count <= 3 for count in counts)


def test_torch_workers_are_told_how_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(get_worker_info=lambda: SimpleNamespace(num_workers=6))
    monkeypatch.setitem(sys.modules, "torch.utils.data", data)
    assert memory._workers() == 6
    data.get_worker_info = lambda: None
    assert memory._workers() == 1


# --- CPUs ----------------------------------------------------------------------------------------


def test_the_affinity_bounds_the_cpus(lay: Lay) -> None:
    assert usable_cpus(lay()) == 32


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 32), ("", 32)],
)
def test_v2_quotas_are_rounded_down_to_at_least_one(lay: Lay, quota: str, cpus: int) -> None:
    assert usable_cpus(lay(on_v2("/a/b") | {"sys/fs/cgroup/a/b/cpu.max": quota})) == cpus


def test_the_tightest_quota_of_all_groups_counts(lay: Lay) -> None:
    files = {
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/cpu.max": "800000 100000\n",
    }
    assert usable_cpus(lay(on_v2("/a/b") | files)) == 3


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 32), ("150000", 3), ("0", 32)])
def test_v1_quotas_bound_the_cpus(lay: Lay, quota: str, cpus: int) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/job"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "50000\n"}
    assert usable_cpus(lay(on_v1("/job") | files)) == cpus


@pytest.mark.parametrize(("text", "cpus"), [("6", 6), ("64", 32), ("0", 32), ("many", 32)])
def test_slurm_bounds_the_cpus(lay: Lay, text: str, cpus: int) -> None:
    assert usable_cpus(lay(environ={"SLURM_CPUS_PER_TASK": text})) == cpus


@pytest.mark.parametrize(("text", "cpus"), [("1", 1), (" 7 ", 7), ("100", 100)])
def test_the_users_number_of_threads_decides(lay: Lay, text: str, cpus: int) -> None:
    environ = {"LAZYCACHE_THREADS": text, "SLURM_CPUS_PER_TASK": "4"}
    assert usable_cpus(lay(environ=environ)) == cpus


@pytest.mark.parametrize("text", ["0", "-2", "many", "2.5", "", "1e3", "²", "9999999"])
def test_a_wrong_number_of_threads_names_the_variable(lay: Lay, text: str) -> None:
    with pytest.raises(SizeError, match="LAZYCACHE_THREADS") as refused:
        usable_cpus(lay(environ={"LAZYCACHE_THREADS": text}))
    assert repr(text) in str(refused.value)
