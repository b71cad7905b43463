"""Volumes in one block of a file: NIfTI, Analyze and MGH, whole and in parts."""

from __future__ import annotations

import bz2
import gc
import gzip
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.freesurfer import MGHImage

import lazycache.readers
from lazycache import _buffers
from lazycache.errors import ReadError, TruncatedFileError, UnknownFormatError
from lazycache.readers import reader_for, slabs, streams
from lazycache.readers.base import cancellable
from lazycache.readers.streams import decoders
from lazycache.testing import check_reader

READER = reader_for("a.nii")
AFFINE = np.array([[-2.0, 0, 0, 9], [0, 2, 0, -8], [0, 0, 3, 7], [0, 0, 0, 1]])
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
REAL = ["u1", "i1", "<i2", ">i2", "u2", "i4", ">u4", "i8", "u8", "f4", ">f4", "f8", ">f8"]
COMPLEX = ["c8", ">c16"]


@pytest.fixture(autouse=True)
def _no_open_decoders() -> Iterator[None]:
    yield
    decoders.clear()


def eager(path: str | Path) -> np.ndarray:
    """What nibabel gives: the oracle of these tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nibabel leaves .mgh files open
        return np.asarray(nib.load(path).dataobj)


def write(
    path: Path,
    array: np.ndarray,
    image_class: Any = nib.Nifti1Image,
    slope: float | None = None,
    inter: float | None = None,
) -> Path:
    """``array`` as it is, on disk, in its byte order, its header saying how it is scaled."""
    header = image_class.header_class(endianness=">" if array.dtype.byteorder == ">" else "<")
    header.set_data_dtype(array.dtype)
    image = image_class(array, AFFINE, header)
    if slope is None:
        image.to_filename(path)
        return path
    # to_filename would rescale: it is written unscaled, and the factors are put in afterwards.
    image.to_filename(path)
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = bytearray(file.read())
    saved = nib.load(path).header.copy()
    saved["scl_slope"], saved["scl_inter"] = slope, inter
    content[: len(saved.binaryblock)] = saved.binaryblock
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(content)
    return path


def voxels(dtype: Any, shape: tuple[int, ...] = (5, 4, 3), seed: int = 0) -> np.ndarray:
    """All bit patterns are welcome, in integers; ordinary numbers in others."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    if dtype.fields or dtype.kind in "iu":
        return rng.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype).reshape(shape)
    values = rng.normal(0, 1000, count)
    if dtype.kind == "c":
        values = values + 1j * rng.normal(size=count)
    return values.astype(dtype).reshape(shape)


# --- whole volumes, to the byte


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX, RGB], ids=str)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_dtype_is_read_as_nibabel_reads_it(tmp_path: Path, dtype: Any, name: str) -> None:
    path = write(tmp_path / name, voxels(dtype))
    check_reader(READER, path, expected=eager(path))


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX])
@pytest.mark.parametrize(
    ("slope", "inter"), [(0.37, 0), (1, -3.5), (-2, 1e6), (3e30, -1e-30), (0, 5), (1, 0)]
)
def test_scaling_is_nibabels_to_the_byte(
    tmp_path: Path, dtype: str, slope: float, inter: float
) -> None:
    path = write(tmp_path / "a.nii", voxels(dtype), slope=slope, inter=inter)
    expected = eager(path)
    data = READER.read(str(path))
    assert (data.dtype, data.shape) == (expected.dtype, expected.shape)
    assert data.tobytes() == expected.tobytes()
    assert data.strides == expected.strides
    assert READER.probe(str(path)).dtype == expected.dtype


def test_a_slope_beyond_doubles_widens_integers_as_nibabel_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels("u8"), nib.Nifti2Image, slope=1e300, inter=0)
    assert eager(path).dtype == np.longdouble
    check_reader(READER, path, expected=eager(path))


@pytest.mark.parametrize("wanted", ["f4", "f8", "i2", ">u2", "u1"])
@pytest.mark.parametrize(("slope", "inter"), [(None, None), (0.5, 10)])
def test_conversion_is_that_of_astype(
    tmp_path: Path, wanted: str, slope: float | None, inter: float | None
) -> None:
    path = write(tmp_path / "a.nii.gz", voxels("u1"), slope=slope, inter=inter)
    expected = eager(path).astype(wanted)
    probe = READER.probe(str(path), dtype=wanted)
    data = READER.read(str(path), dtype=wanted)
    assert data.dtype == probe.dtype == expected.dtype
    assert data.tobytes("F") == expected.tobytes("F")
    assert data.flags.f_contiguous
    part = READER.read_part(str(path), (1, slice(None), slice(0, 3, 2)), dtype=wanted)
    assert part.tobytes() == expected[1, :, 0:3:2].tobytes()


@pytest.mark.parametrize(
    "shape",
    [(7,), (3, 4), (1, 5, 1), (5, 4, 3), (3, 4, 2, 5), (2, 3, 1, 2, 3), (2, 1, 2, 1, 2, 1, 3)],
)
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_shape_keeps_nibabels_memory_order(
    tmp_path: Path, shape: tuple[int, ...], image_class: Any
) -> None:
    path = write(tmp_path / "a.nii.gz", voxels("i2", shape), image_class)
    check_reader(READER, path, expected=eager(path))
    assert READER.read(str(path)).strides == eager(path).strides


def test_an_empty_axis_gives_an_empty_array_of_the_headers_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels("i2", (4, 0, 3)))
    check_reader(READER, path)
    assert READER.read(str(path)).shape == (4, 0, 3)


KINDS: list[tuple[str, Any, str]] = [
    ("a.nii.bz2", nib.Nifti1Image, "NIfTI-1"),
    ("a.nii", nib.Nifti2Image, "NIfTI-2"),
    ("a.img", nib.Nifti1Pair, "NIfTI-1 pair"),
    ("a.hdr", nib.Nifti1Pair, "NIfTI-1 pair"),
    ("a.img.gz", nib.Nifti1Pair, "NIfTI-1 pair"),
    ("a.hdr.gz", nib.Nifti2Pair, "NIfTI-2 pair"),
    ("a.img.bz2", nib.Nifti2Pair, "NIfTI-2 pair"),
]


@pytest.mark.parametrize(("name", "image_class", "kind"), KINDS)
def test_pairs_and_compressions(tmp_path: Path, name: str, image_class: Any, kind: str) -> None:
    path = write(tmp_path / name, voxels(">i2"), image_class)
    check_reader(READER, path, expected=eager(path))
    probe = READER.probe(str(path))
    assert probe.format == kind
    assert set(probe.files) == {str(file) for file in tmp_path.iterdir()}
    assert probe.files[0] == str(path)


@pytest.mark.parametrize("image_class", [nib.AnalyzeImage, nib.Spm99AnalyzeImage])
@pytest.mark.parametrize("name", ["a.img", "a.img.gz"])
def test_analyze_and_spm(tmp_path: Path, image_class: Any, name: str) -> None:
    image_class(voxels("i2"), AFFINE).to_filename(tmp_path / name)
    check_reader(READER, tmp_path / name, expected=eager(tmp_path / name))
    probe = READER.probe(str(tmp_path / name))
    assert "Analyze" in probe.format
    if image_class is nib.AnalyzeImage:
        assert probe.affine is None
    else:
        np.testing.assert_allclose(probe.affine, AFFINE)
        assert any(file.startswith(str(tmp_path / "a.mat")) for file in probe.files)


@pytest.mark.parametrize("dtype", ["u1", ">i2", ">i4", ">f4"])
@pytest.mark.parametrize("name", ["a.mgh", "a.mgz"])
def test_mgh(tmp_path: Path, dtype: str, name: str) -> None:
    image = MGHImage(voxels(dtype, (3, 4, 5, 2)), AFFINE)
    image.header["tr"] = 2500
    image.to_filename(tmp_path / name)
    check_reader(READER, tmp_path / name, expected=eager(tmp_path / name))
    probe = READER.probe(str(tmp_path / name))
    assert probe.format == "MGH"
    np.testing.assert_allclose(probe.affine, AFFINE, atol=1e-5)
    assert probe.header.get_zooms()[:3] == image.header.get_zooms()[:3]
    if name == "a.mgh":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            assert probe.header == nib.load(tmp_path / name).header


def test_a_header_extension_and_a_late_start_of_the_voxels(tmp_path: Path) -> None:
    image = nib.Nifti1Image(voxels("i2"), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment" * 50))
    for name in ("a.nii", "a.nii.gz"):
        image.to_filename(tmp_path / name)
        check_reader(READER, tmp_path / name, expected=eager(tmp_path / name))
        assert READER.probe(str(tmp_path / name)).header.extensions == image.header.extensions


# --- what probe tells


def test_without_spatial_codes_there_is_no_affine(tmp_path: Path) -> None:
    image = nib.Nifti1Image(voxels("i2"), AFFINE)
    image.to_filename(tmp_path / "coded.nii")
    image.set_sform(AFFINE, 0)
    image.set_qform(AFFINE, 0)
    image.to_filename(tmp_path / "bare.nii")
    coded = READER.probe(str(tmp_path / "coded.nii")).affine
    np.testing.assert_array_equal(coded, AFFINE)
    assert not coded.flags.writeable
    assert READER.probe(str(tmp_path / "bare.nii")).affine is None


def test_probe_says_why_the_dtype_is_not_the_one_on_disk(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.nii", voxels("i2"), slope=0.5, inter=3))
    assert (
        READER.probe(path).dtype_reason == "int16 on disk, scaled by scl_slope 0.5 and scl_inter 3"
    )
    assert READER.probe(path, dtype="f4").dtype_reason == "asked for"
    plain = str(write(tmp_path / "b.nii", voxels("i2")))
    assert READER.probe(plain).dtype_reason == ""


def test_probe_reads_no_voxel_of_a_compressed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, image_class in (("a.nii.gz", nib.Nifti1Image), ("a.mgz", MGHImage)):
        image = image_class(np.zeros((128, 128, 64), np.int16), AFFINE)
        image.to_filename(tmp_path / name)
        READER.probe(str(tmp_path / name))
        tracemalloc.start()
        READER.probe(str(tmp_path / name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000


# --- damage


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii.bz2", "a.nii"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, voxels("f8", (20, 20, 20)))
    content = path.read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 100, 20):
        path.write_bytes(content[:kept])
        with pytest.raises(TruncatedFileError, match=f"{name} is truncated"):
            READER.read(str(path))


def test_truncation_of_a_plain_file_is_seen_by_probe(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels("f8"))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TruncatedFileError, match="the 480 bytes of its voxels"):
        READER.probe(str(path))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii.bz2"])
def test_a_wrong_checksum_is_damage(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, voxels("f8", (20, 20, 20)))
    content = bytearray(path.read_bytes())
    at = -6 if name.endswith("gz") else len(content) // 2
    content[at] ^= 1
    path.write_bytes(content)
    # In bzip2 the damage spreads to the header, which is then not recognised.
    with pytest.raises(ReadError, match=f"{name} is damaged" if name.endswith("gz") else name):
        READER.read(str(path))


def test_several_gzip_members_are_one_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels("i2", (30, 30, 30)))
    content = path.read_bytes()
    for pack, name in ((gzip.compress, "b.nii.gz"), (bz2.compress, "b.nii.bz2")):
        cuts = [0, 10, 352, 5000, 5001, len(content)]
        packed = b"".join(pack(content[a:b]) for a, b in pairwise(cuts))
        (tmp_path / name).write_bytes(packed)
        check_reader(READER, tmp_path / name, expected=eager(path))


@pytest.mark.parametrize("after", [b"\0" * 512, b"garbage", b"\x1f", b"\x1f\x8b"])
def test_what_follows_the_last_member_is_ignored(tmp_path: Path, after: bytes) -> None:
    path = write(tmp_path / "a.nii.gz", voxels("i2"))
    expected = eager(path)
    with open(path, "ab") as file:
        file.write(after)
    assert READER.read(str(path)).tobytes() == expected.tobytes()


def test_a_member_that_ends_too_early_is_truncated_whatever_follows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels("i2"))
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()[:-1]) + b"garbage")
    with pytest.raises(TruncatedFileError, match=r"b\.nii\.gz is truncated"):
        READER.read(str(packed))


def test_voxels_that_can_not_be_scaled_are_an_error_with_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels(RGB), slope=2, inter=0)
    with pytest.raises(ReadError, match=r"a\.nii: .* can't be scaled"):
        READER.probe(str(path))


def test_a_header_with_a_negative_axis_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", voxels("i2"))
    content = bytearray(path.read_bytes())
    content[42:44] = (-5).to_bytes(2, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(ReadError, match=r"a\.nii: its header"):
        READER.probe(str(path))


def test_gzip_content_under_a_plain_name_is_an_unknown_format(tmp_path: Path) -> None:
    packed = write(tmp_path / "a.nii.gz", voxels("i2"))
    path = packed.rename(tmp_path / "a.nii")
    with pytest.raises(UnknownFormatError, match=r"a\.nii: .* rename"):
        READER.probe(str(path))


# --- memory


def test_a_large_volume_lies_in_a_buffer_of_ours_that_dies_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", np.zeros((128, 128, 80), np.int16))
    before = {id(obj) for obj in gc.get_objects()}
    data = READER.read(str(path))
    owner = _buffers.owner_of(data)
    assert type(owner).__name__ == "mmap"
    assert id(owner) not in before
    assert not isinstance(data, np.memmap)
    view = data[3:5]
    del data
    assert _buffers.owner_of(view) is owner


PEAK = """
import sys
import lazycache.readers
from lazycache.readers import reader_for

path, small, dtype = sys.argv[1:]
reader = reader_for(path)
options = {"dtype": dtype} if dtype else {}
reader.read(small, **options)

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

before = status("VmRSS")
data = reader.read(path, **options)
promised = reader.probe(path, **options).peak_nbytes
print(status("VmHWM") - before - data.nbytes, promised - data.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "slope", "dtype"),
    [("a.nii.gz", None, ""), ("a.nii.gz", 0.5, ""), ("a.nii.gz", 0.5, "f4"), ("a.nii", None, "")],
)
def test_reading_peaks_at_the_result_and_a_few_slabs(
    tmp_path: Path, name: str, slope: float | None, dtype: str
) -> None:
    ramp = np.arange(64 * 64 * 32, dtype=np.int16).reshape(64, 64, 32, order="F")
    small = write(tmp_path / f"small-{name}", ramp, slope=slope, inter=0)
    # 64 MB on disk once it is decompressed: the small volume's voxels, 256 times.
    header = nib.load(small).header.copy()
    header.set_data_shape((64, 64, 32 * 256))
    if slope is not None:
        header["scl_slope"], header["scl_inter"] = slope, 0
    path = tmp_path / name
    opened: Any = gzip.open(path, "wb", 1) if name.endswith("gz") else open(path, "wb")  # noqa: SIM115 - one or the other
    with opened as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(256):
            file.write(ramp.tobytes("F"))
    root = str(Path(lazycache.readers.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), str(small), dtype],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    beside, promised = map(int, done.stdout.split())
    assert beside <= 8 << 20
    assert promised <= 4 << 20


# --- parts


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, np.ndarray]:
    """A 4D run in a compressed file, and its voxels; a volume is larger than a step."""
    array = voxels("i2", (64, 64, 40, 6))
    return str(write(tmp_path / "run.nii.gz", array)), array


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all that is decompressed."""
    lengths: list[int] = []

    def count(self: streams.CompressedStream, most: int) -> bytes:
        piece = original(self, most)
        lengths.append(len(piece))
        return piece

    original = streams.CompressedStream._step
    monkeypatch.setattr(streams.CompressedStream, "_step", count)
    return lengths


def at(t: int | slice) -> tuple[int | slice, ...]:
    return (slice(None), slice(None), slice(None), t)


def test_successive_time_points_cost_one_pass(
    run: tuple[str, np.ndarray], decoded: list[int]
) -> None:
    path, array = run
    for t in range(6):
        part = READER.read_part(path, at(t))
        assert part.tobytes("F") == array[..., t].tobytes("F")
        assert part.flags.f_contiguous
        assert not part.flags.writeable
    assert sum(decoded) == pytest.approx(array.nbytes, rel=0.01)
    assert len(decoders) == 0


def test_going_back_starts_again_and_keeps_both_places(
    run: tuple[str, np.ndarray], decoded: list[int]
) -> None:
    path, array = run
    for t in (3, 1, 4, 2):
        assert READER.read_part(path, at(t)).tobytes("F") == array[..., t].tobytes("F")
    # 0 to 3, 0 to 1; then 4 goes on from where 3 ended, and 2 from where 1 did.
    assert sum(decoded) == pytest.approx(8 * array[..., 0].nbytes, rel=0.01)
    assert len(decoders) == 2


def test_a_part_of_a_plain_file_reads_only_that(tmp_path: Path) -> None:
    array = voxels("i2", (64, 64, 40, 6))
    path = str(write(tmp_path / "a.nii", array))
    seen = 0

    class Counting(streams.PlainStream):
        def readinto(self, view: memoryview) -> None:
            nonlocal seen
            seen += len(view)
            super().readinto(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PlainStream", Counting)
        for index, most in [
            (at(2), 64 * 64 * 40 * 2),
            ((slice(None), slice(None), 7, 5), 64 * 64 * 2),
            ((3, 4, 5, 1), 64 * 64 * 2),
            ((slice(None), slice(None), slice(0, 40, 20), 0), 64 * 64 * 2 * 21),
        ]:
            seen = 0
            assert READER.read_part(path, index).tobytes() == array[index].tobytes()
            assert 0 < seen <= most


def test_at_most_four_open_decoders_wait(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{n}.nii.gz", voxels("i2", (9, 9, 9, 3)))) for n in range(6)]
    for path in paths:
        READER.read_part(path, at(0))
    assert len(decoders) == 4


def test_a_file_written_again_is_not_read_through_an_old_decoder(
    run: tuple[str, np.ndarray],
) -> None:
    path, _ = run
    READER.read_part(path, at(0))
    new = voxels("i2", (64, 64, 40, 6), seed=1)
    write(Path(path), new)
    os.utime(path, ns=(1, 1))
    assert READER.read_part(path, at(1)).tobytes("F") == new[..., 1].tobytes("F")


def test_threads_never_share_a_decoder(run: tuple[str, np.ndarray]) -> None:
    path, array = run
    together = threading.Barrier(4)

    def read(order: tuple[int, ...]) -> None:
        together.wait(30)
        for t in order:
            assert READER.read_part(path, at(t)).tobytes("F") == array[..., t].tobytes("F")

    orders = [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (0, 2, 4, 1, 3, 5), (3, 3, 3)]
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(read, order) for order in orders]:
            future.result(60)
    assert len(decoders) <= 4


def test_a_part_that_fails_leaves_no_decoder_behind(run: tuple[str, np.ndarray]) -> None:
    path, _ = run
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    with pytest.raises(TruncatedFileError):
        READER.read_part(path, at(5))
    assert len(decoders) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_the_checksum_is_verified_with_the_last_voxel(
    run: tuple[str, np.ndarray], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = run
    content = bytearray(Path(path).read_bytes())
    content[-6] ^= 1
    Path(path).write_bytes(content)

    def without_the_trailer(path: str) -> streams.Stream:
        # All voxels come out of the first bytes; nothing makes the decoder see the last eight.
        return original(path, len(content) - 8)

    original = streams.open_stream
    monkeypatch.setattr(slabs, "open_stream", without_the_trailer)
    monkeypatch.setattr(decoders, "_open", without_the_trailer)
    READER.read_part(path, at(4))
    with pytest.raises(ReadError, match="damaged"):
        READER.read(path) if whole else READER.read_part(path, at(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_does_not_move_its_parents_decoder(run: tuple[str, np.ndarray]) -> None:
    path, array = run
    READER.read_part(path, at(0))
    with decoders._lock:  # held by another thread, as it were, at the moment of the fork
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            try:
                empty = len(decoders) == 0
                same = READER.read_part(path, at(1)).tobytes("F") == array[..., 1].tobytes("F")
                os._exit(0 if empty and same else 1)
            except BaseException:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(decoders) == 1
    for t in range(1, 6):
        assert READER.read_part(path, at(t)).tobytes("F") == array[..., t].tobytes("F")


# --- cancelling


def test_checkpoints_come_at_least_every_slab(run: tuple[str, np.ndarray]) -> None:
    path, array = run
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    for name in (path, str(write(Path(path).with_name("plain.nii"), array))):
        asked = 0
        with cancellable(count):
            READER.read(name)
        assert asked >= array.nbytes // streams.STEP
