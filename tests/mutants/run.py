"""Break each promise on purpose, and see that the tests notice.

    python tests/mutants/run.py [NAME ...]

Each ``*.patch`` beside this file is a mutant: the first lines say which promise it breaks and which
test files must notice, the rest is the change. It is applied to a copy of the checkout, and those
tests run there until the first of them fails. A mutant that all of them pass has survived, which
fails the run, as does a patch that doesn't apply any more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COPIED = ["lazycache", "tests", "benchmarks", "pyproject.toml"]
LIMIT = 300.0  # seconds for the tests of one mutant


class Verdict(NamedTuple):
    name: str
    promise: str
    caught_by: str  # "" if nothing noticed
    seconds: float
    output: str


def try_mutant(patch: Path) -> Verdict:
    text = patch.read_text()
    promise, tests = (
        re.search(rf"^{field}: (.+)$", text, re.MULTILINE)[1] for field in ("Promise", "Tests")
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder, name))
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
        started = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=30", "--no-header",
             "-p", "no:cacheprovider", *tests.split()],
            cwd=folder, env={**os.environ, "PYTHONPATH": folder},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            timeout=LIMIT,
        )  # fmt: skip
        seconds = time.monotonic() - started
    # A test that hangs is ended by its own timeout, which may end the whole run with it.
    noticed = re.search(
        r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$|^(tests\S+) .*Timeout", process.stdout, re.MULTILINE
    )
    caught_by = next(filter(None, noticed.groups())) if noticed else ""
    return Verdict(patch.stem, promise, caught_by, seconds, process.stdout)


def main(names: list[str]) -> int:
    patches = sorted(p for p in HERE.glob("*.patch") if not names or p.stem in names)
    survivors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for verdict in pool.map(try_mutant, patches):
            result = verdict.caught_by or "SURVIVED"
            print(f"{verdict.name:32} {verdict.seconds:5.1f} s  {result}", flush=True)
            if not verdict.caught_by:
                survivors.append(verdict)
    for verdict in survivors:
        print(f"\n{verdict.name} broke a promise and no test noticed: {verdict.promise}")
        print(verdict.output[-2000:])
    print(f"\n{len(patches) - len(survivors)} of {len(patches)} mutants were caught")
    return 1 if survivors or not patches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
