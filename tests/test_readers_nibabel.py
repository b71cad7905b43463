"""Every sample file that nibabel ships, and the formats that only nibabel reads."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.ecat import EcatImage

from lazycache import _buffers
from lazycache.errors import ReadError, TruncatedFileError, UnknownFormatError
from lazycache.readers import reader_for
from lazycache.readers.images import opened
from lazycache.testing import check_reader

READER = reader_for("a.nii")
PACKAGE = Path(nib.__file__).parent
DATA = PACKAGE / "tests" / "data"
SAMPLES = sorted(
    str(path.relative_to(PACKAGE))
    for folder in PACKAGE.rglob("data")
    for path in folder.iterdir()
    if path.is_file() and path.suffix not in (".py", ".pyc")
)


@contextmanager
def loaded(path: Path) -> Iterator[Any]:
    """nibabel's image; the file that it may leave open is closed."""
    image = EcatImage.from_filename(path) if path.suffix == ".v" else nib.load(path)
    try:
        yield image
    finally:
        files = [getattr(getattr(image, "dataobj", None), "file_like", None)]
        if path.suffix == ".v":
            files.append(image.get_subheaders().fileobj)
        for file in files:
            if hasattr(file, "close"):
                file.close()


def nibabel_loads(path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with loaded(path) as image:
                if hasattr(image, "dataobj"):
                    np.asarray(image.dataobj)
                return True
        except Exception:
            return False


def test_there_are_samples() -> None:
    assert len(SAMPLES) > 50, "this nibabel was installed without its sample files"


@pytest.mark.filterwarnings("ignore:Invalid spacing declaration:UserWarning")
@pytest.mark.filterwarnings("ignore:multiple TRs:UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_sample_is_read_as_nibabel_reads_it_or_is_a_clear_error(sample: str) -> None:
    path = PACKAGE / sample
    if not nibabel_loads(path):
        with pytest.raises(OSError, match=re.escape(path.stem)):
            reader_for(str(path)).read(str(path))
        return
    probe = reader_for(str(path)).probe(str(path))
    with loaded(path) as image:
        if probe.shape is None:
            check_reader(reader_for(str(path)), path)
            return
        expected = np.asarray(image.dataobj)
        affine = getattr(image, "affine", None)
    assert (probe.shape, probe.dtype, probe.nbytes) == (
        expected.shape,
        expected.dtype,
        expected.nbytes,
    )
    assert READER.read(str(path)).strides == expected.strides
    if probe.affine is not None:
        np.testing.assert_array_equal(probe.affine, affine)
    check_reader(READER, path, expected=expected)


@pytest.mark.parametrize(
    ("name", "kind", "has_affine"),
    [
        ("tiny.mnc", "MINC 1", True),
        ("small.mnc", "MINC 2", True),
        ("scaled+tlrc.HEAD", "AFNI", True),
        ("phantom_varscale.PAR", "Philips PAR/REC", True),
        ("tinypet.v", "ECAT 7", True),
        ("row_major.dconn.nii", "CIFTI-2", False),
        ("example_nifti2.nii.gz", "NIfTI-2", True),
    ],
)
def test_formats_have_names_and_affines(name: str, kind: str, has_affine: bool) -> None:
    probe = READER.probe(str(DATA / name))
    assert probe.format == kind
    assert (probe.affine is not None) == has_affine
    assert probe.header is not None


def test_both_files_of_a_volume_are_named_from_either() -> None:
    for one, two in [("scaled+tlrc.HEAD", "scaled+tlrc.BRIK"), ("phantom_varscale.PAR",) * 2]:
        two = two.replace(".PAR", ".REC")
        files = {str(DATA / one), str(DATA / two)}
        assert set(READER.probe(str(DATA / one)).files) == files
        assert set(READER.probe(str(DATA / two)).files) == files


def test_options_go_to_nibabel(tmp_path: Path) -> None:
    path = str(DATA / "phantom_varscale.PAR")
    floating = READER.read(path, scaling="fp")
    image = nib.load(path, scaling="fp")
    expected = np.asarray(image.dataobj)
    image.dataobj.file_like.close()
    assert floating.tobytes() == expected.tobytes()
    assert floating.tobytes() != READER.read(path).tobytes()
    for other in (path, str(DATA / "tiny.mnc")):
        with pytest.raises(TypeError, match="nonsense"):
            READER.read(other, nonsense=1)


def test_a_header_without_voxels_names_the_missing_file() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        READER.probe(str(DATA / "analyze.hdr"))
    assert caught.value.filename == str(DATA / "analyze.img")
    with pytest.raises(FileNotFoundError) as caught:
        READER.probe(str(DATA / "T1.PAR"))
    assert caught.value.filename == str(DATA / "T1.REC")


def test_truncated_voxels_of_a_plain_volume_are_seen_by_probe(tmp_path: Path) -> None:
    for name in ("scaled+tlrc.HEAD", "scaled+tlrc.BRIK"):
        shutil.copy(DATA / name, tmp_path)
    os.truncate(tmp_path / "scaled+tlrc.BRIK", 1000)
    with pytest.raises(TruncatedFileError, match="BRIK is truncated"):
        READER.probe(str(tmp_path / "scaled+tlrc.HEAD"))


def test_a_minc_1_header_is_read_without_its_voxels() -> None:
    with opened(str(DATA / "tiny.mnc"), {}) as image:
        stored = image.dataobj.minc_file._image.data
        assert isinstance(_buffers.owner_of(stored), mmap.mmap)
        del stored


def test_minc_1_voxels_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mnc"
    shutil.copy(DATA / "tiny.mnc", path)
    data = READER.read(str(path))
    expected = data.copy()
    path.unlink()
    np.testing.assert_array_equal(data, expected)


# --- surfaces


@pytest.mark.parametrize(
    "name",
    ["ascii.gii", "base64bin.gii", "gzipbase64.gii", "label.gii", "external.gii", "task.func.gii"],
)
def test_a_surfaces_size_is_told_without_decoding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(PACKAGE / "gifti" / "tests" / "data" / name)
    image = nib.load(path)
    nbytes = sum(array.data.nbytes for array in image.darrays)
    monkeypatch.setattr(nib.loadsave, "load", None)
    probe = READER.probe(path)
    assert (probe.format, probe.shape, probe.dtype) == ("GIFTI", None, None)
    assert probe.nbytes == nbytes
    assert probe.affine is None


def test_a_surface_is_nibabels_image_with_read_only_arrays() -> None:
    path = str(PACKAGE / "gifti" / "tests" / "data" / "base64bin.gii")
    image, expected = READER.read(path), nib.load(path)
    assert isinstance(image, nib.GiftiImage)
    for array, wanted in zip(image.darrays, expected.darrays, strict=True):
        np.testing.assert_array_equal(array.data, wanted.data)
        with pytest.raises(ValueError, match="read-only"):
            array.data[0] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.data.flags.writeable = True


def test_the_file_that_holds_a_surfaces_arrays_counts(tmp_path: Path) -> None:
    folder = PACKAGE / "gifti" / "tests" / "data"
    for name in ("external.gii", "external.dat"):
        shutil.copy(folder / name, tmp_path)
    path = str(tmp_path / "external.gii")
    assert READER.probe(path).files == (path, str(tmp_path / "external.dat"))


def test_a_surface_has_no_dtype_and_no_parts() -> None:
    path = str(PACKAGE / "gifti" / "tests" / "data" / "ascii.gii")
    with pytest.raises(ReadError, match="is a surface"):
        READER.read(path, dtype="f4")
    with pytest.raises(ReadError, match="is a surface"):
        READER.read_part(path, (0,))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<GIFTI><DataArray", TruncatedFileError, "is truncated"),
        ("<GIFTI>", TruncatedFileError, "is truncated"),
        ("<svg></svg>", UnknownFormatError, "its content is <svg>"),
        ("<GIFTI></svg>", ReadError, "is damaged"),
        ("<GIFTI><DataArray/></GIFTI>", ReadError, "attributes can't be understood"),
    ],
)
def test_bad_xml_is_an_error_with_the_name(
    tmp_path: Path, text: str, error: type[ReadError], message: str
) -> None:
    path = tmp_path / "a.gii"
    path.write_text(text, encoding="utf8")
    with pytest.raises(error, match=rf"a\.gii.*{message}"):
        READER.probe(str(path))


@pytest.mark.parametrize("text", ["<GIFTI>", "<svg></svg>", "<GIFTI></svg>", "?"])
def test_bad_xml_is_never_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.gii"
    path.write_text(text, encoding="utf8")
    with pytest.raises(ReadError, match=r"a\.gii"):
        READER.read(str(path))
