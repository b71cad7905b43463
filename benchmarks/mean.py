"""How fast, and in how much memory, is the mean of 100 real-size volumes?

Whole processes, from their start to the written ``.nii.gz``, on all cores: lazycache as a script
and as a command, the best code written by hand for this one thing (see ``peer_mean``), the loop
that people write with nibabel, and niimath, if it is there (``pip install --group bench``). Each
round runs all of them; the table has medians, and how long each took for each second of lazycache.

    python -m benchmarks.mean [--count 20] [--rounds 5] [--folder made-volumes]
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .measure import Whole, interleaved, mib, ratio, resident, whole
from .volumes import subjects

HERE = (sys.executable, "-m", "benchmarks.mean", "--only")
LOOP = "nibabel loop"


def script(budget: str, out: str, *paths: str) -> None:
    import nibabel  # noqa: F401 - lazycache would import it later

    import lazycache as lc

    lc.set_budget(budget)
    imported = resident("VmRSS")
    lc.mean([lc.load(path) for path in paths]).save(out)
    stats = lc.get_cache().stats()
    told = {"imported": imported, "accounted": stats.peak_bytes, "over": stats.overcommits}
    print(json.dumps({**told, "loads": stats.loads}))


def loop(out: str, *paths: str) -> None:
    import nibabel
    import numpy as np

    total: Any = None
    for path in paths:
        image: Any = nibabel.load(path)
        if total is None:
            total = np.zeros(image.shape, order="F")
        total += np.asarray(image.dataobj)
    nibabel.save(nibabel.Nifti1Image(total / len(paths), image.affine), out)


def smallest(*paths: str) -> None:
    """The smallest budget with which each file is read once, and what writing takes besides."""
    import lazycache as lc

    plan = lc.explain(lc.mean([lc.load(path) for path in paths]))
    print(plan.single_pass_budget)


def differences(*outs: str) -> None:
    """The largest difference of each image from the first."""
    import nibabel
    import numpy as np

    first, *others = (np.asarray(nibabel.load(out).dataobj) for out in outs)
    print(json.dumps([float(np.abs(other - first).max()) for other in others]))


PARTS = {one.__name__: one for one in (script, loop, smallest, differences)}


def niimath() -> str | None:
    """The binary: the command of this name may be a wrapper in Python."""
    beside = os.path.dirname(sys.executable)
    command = shutil.which("niimath", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if command is None:
        return None
    with open(command, "rb") as file:
        if file.read(2) != b"#!":
            return command
    found = whole(
        Path(command).read_text().splitlines()[0].removeprefix("#!").strip(),
        "-c",
        "import niimath, pathlib; print(pathlib.Path(niimath.__file__).parent / 'bin/niimath')",
    )
    return found.told.strip()


def contenders(paths: list[str], budgets: list[str], out: Path) -> dict[str, list[str]]:
    """The command of each; its result goes to ``out / <its number>.nii.gz``."""
    commands: dict[str, list[str]] = {}

    def add(name: str, *command: str) -> None:
        result = str(out / f"{len(commands)}.nii.gz")
        commands[name] = [result if item == "OUT" else item for item in command]

    for budget in budgets:
        add(f"lazycache, {mib(int(budget))}", *HERE, "script", budget, "OUT", *paths)
    command = [sys.executable, "-m", "lazycache", "eval", "mean(images)", *paths, "-o", "OUT"]
    add("lazycache eval", *command, "--dtype", "float64", "--budget", budgets[0], "--quiet")
    add("by hand: one sum", sys.executable, "-m", "benchmarks.peer_mean", "OUT", *paths)
    add("by hand: many sums", sys.executable, "-m", "benchmarks.peer_mean", "--sums", "OUT", *paths)
    add(LOOP, *HERE, "loop", "OUT", *paths)
    if (binary := niimath()) is not None:
        more = [item for path in paths[1:] for item in ("-add", path)]
        add("niimath, float32", binary, paths[0], *more, "-div", str(len(paths)), "OUT")
        double = ["-dt", "double", paths[0], *more, "-div", str(len(paths)), "OUT"]
        add("niimath, float64", binary, *double, "-odt", "double")
    return commands


def table(found: dict[str, list[Whole]], differ: list[float]) -> None:
    ours = [one.seconds for one in next(iter(found.values()))]
    print(
        f"{'':22}{'time':>9}{'ratio':>8}{'processors':>12}{'peak':>10}{'over imports':>14}"
        f"{'accounted':>11}{'differs by':>12}"
    )
    for (name, runs), difference in zip(found.items(), differ, strict=True):
        seconds = [one.seconds for one in runs]
        line = (
            f"{name:22}{statistics.median(seconds):>7.2f} s{ratio(ours, seconds):>7.2f}x"
            f"{statistics.median(one.cpu for one in runs):>10.2f} s"
            f"{mib(max(one.peak for one in runs)):>10}"
        )
        if runs[0].told.startswith("{"):
            told = [json.loads(one.told) for one in runs]
            over = max(one.peak - own["imported"] for one, own in zip(runs, told, strict=True))
            line += f"{mib(over):>14}{mib(max(own['accounted'] for own in told)):>11}"
        else:
            line += " " * 25
        print(f"{line}{difference:>12.1g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="volumes (default: 100)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the volumes here, for the next time")
    parser.add_argument("--budget", type=int, default=512, help="MiB (default: 512)")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        part, *rest = arguments.only
        PARTS[part](*rest)
        return 0

    # As installed packages are, whatever Python is told to do with others.
    for package in ("lazycache", "benchmarks"):
        compileall.compile_dir(Path(__file__).parents[1] / package, quiet=1)
    with (
        subjects(arguments.folder, arguments.count) as made,
        tempfile.TemporaryDirectory(prefix="lazycache-mean-") as out,
    ):
        paths = [str(path) for path in made]
        budgets = [str(arguments.budget << 20), whole(*HERE, "smallest", *paths).told]
        commands = contenders(paths, budgets, Path(out))
        runs: dict[str, Callable[[], Whole]] = {
            name: partial(whole, *command) for name, command in commands.items()
        }
        found = interleaved(runs, arguments.rounds)
        outs = [str(Path(out) / f"{number}.nii.gz") for number in range(len(commands))]
        differ = [0.0, *json.loads(whole(*HERE, "differences", *outs).told)]
    print(f"the mean of {len(paths)} volumes, {arguments.rounds} rounds")
    table(found, differ)
    if niimath() is None:
        print("niimath isn't there: pip install --group bench")
    lazy = [runs for name, runs in found.items() if name.startswith("lazycache, ")]
    told = [json.loads(one.told) for runs in lazy for one in runs]
    kept = all(own["over"] == 0 and own["loads"] == len(paths) for own in told)
    # niimath multiplies where NumPy divides, and computes in float32 unless it is told otherwise.
    right = all(
        difference <= (1e-3 if name.startswith("niimath") else 0)
        for name, difference in zip(found, differ, strict=True)
    )
    print(
        f"{'each file was read once, within the budget' if kept else 'THE BUDGET DID NOT HOLD'}; "
        f"the results are {'equal' if right else 'DIFFERENT'}"
    )
    return 0 if kept and right else 1


if __name__ == "__main__":
    sys.exit(main())
