"""The mean of many volumes as one would write it by hand for speed, without lazycache.

Threads decompress whole files with isal into a few buffers that are used again and again, in order
and never further ahead than there are buffers; the calling thread adds them up in place. With
``--sums`` each thread adds up what it reads, slab by slab, into a sum of its own: faster, for as
many float64 volumes as there are threads, and the same to the byte only because the sums of
integers are exact. nibabel reads one header.

Both take for granted that the volumes are unscaled, of one type and shape and on one grid, that
none is damaged, and that nobody is interested in any other function.

    python -m benchmarks.peer_mean [--sums] OUT.nii.gz FILE.nii.gz ...
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from numpy.typing import NDArray

THREADS = len(os.sched_getaffinity(0))
BUFFERS_AHEAD = 2
SLAB = 1 << 20


def fill(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise EOFError(file.name)
        done += count


def one_sum(paths: Sequence[str], first: Any) -> NDArray[np.float64]:
    voxels, offset, dtype = int(np.prod(first.shape)), first.dataobj.offset, first.dataobj.dtype
    total = np.zeros(voxels)

    def read(path: str, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with igzip.open(path) as file:
            fill(file, memoryview(buffer))
        return buffer

    left = iter(paths)
    running: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for _, path in zip(range(THREADS + BUFFERS_AHEAD), left, strict=False):
            buffer = np.empty(offset + voxels * dtype.itemsize, np.uint8)
            running.append(pool.submit(read, path, buffer))
        while running:
            buffer = running.popleft().result()
            np.add(total, buffer[offset:].view(dtype), out=total)
            if path := next(left, ""):
                running.append(pool.submit(read, path, buffer))
    return total


def sums(paths: Sequence[str], first: Any) -> NDArray[np.float64]:
    voxels, offset, dtype = int(np.prod(first.shape)), first.dataobj.offset, first.dataobj.dtype
    left = deque(paths)

    def work(_: int) -> NDArray[np.float64]:
        total = np.zeros(voxels)
        slab = np.empty(SLAB // dtype.itemsize, dtype)
        while True:
            try:
                path = left.popleft()
            except IndexError:
                return total
            with igzip.open(path) as file:
                file.read(offset)
                for start in range(0, voxels, slab.size):
                    part = slab[: voxels - start]
                    fill(file, part.view(np.uint8).data)
                    where = total[start : start + part.size]
                    np.add(where, part, out=where)

    with ThreadPoolExecutor(THREADS) as pool:
        total, *others = pool.map(work, range(THREADS))
    for other in others:
        total += other
    return total


def write(path: str, total: NDArray[np.float64], like: Any) -> None:
    header = like.header.copy()
    header.set_data_dtype(total.dtype)
    header.set_data_offset(352)
    with igzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        file.write(total)


def main() -> int:
    add_up = one_sum
    arguments = sys.argv[1:]
    if arguments[0] == "--sums":
        add_up = sums
        del arguments[0]
    out, *paths = arguments
    first: Any = nibabel.load(paths[0])
    total = add_up(paths, first)
    total /= len(paths)
    write(out, total, first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
