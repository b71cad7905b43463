"""Opening an image with nibabel: its header read, its voxels not, and what to say when it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from io import BytesIO
from typing import Any

from lazycache.errors import ReadError, UnknownFormatError

from .files import check_file, missing, truncated
from .streams import content_of, head_of, is_compressed

_FORMATS = {
    "Nifti1Image": "NIfTI-1",
    "Nifti1Pair": "NIfTI-1 pair",
    "Nifti2Image": "NIfTI-2",
    "Nifti2Pair": "NIfTI-2 pair",
    "Cifti2Image": "CIFTI-2",
    "Spm2AnalyzeImage": "SPM2 Analyze",
    "Spm99AnalyzeImage": "SPM99 Analyze",
    "AnalyzeImage": "Analyze",
    "MGHImage": "MGH",
    "Minc1Image": "MINC 1",
    "Minc2Image": "MINC 2",
    "PARRECImage": "Philips PAR/REC",
    "AFNIImage": "AFNI",
    "EcatImage": "ECAT 7",
}
_SNIFF = 1024
_SHORTEST = 348
_LONGEST = 64 << 20  # of a header with its extensions
_MGH_HEADER = 90
_MGH_FOOTER = 20
_NIFTI1_SIZES = {(348).to_bytes(4, "little"), (348).to_bytes(4, "big")}
_NIFTI_SIZES = {*_NIFTI1_SIZES, (540).to_bytes(4, "little"), (540).to_bytes(4, "big")}


def format_of(image_class: type) -> str:
    """The name of a format, for people."""
    return _FORMATS.get(image_class.__name__, image_class.__name__)


def array_proxy() -> Any:
    """nibabel's class for voxels that are one block of a file."""
    return nibabel_module("arrayproxy").ArrayProxy


def nibabel_module(module: str) -> Any:
    # Imported at the first need, and as Any: nibabel has annotations on a part of it only.
    return import_module(f"nibabel.{module}")


@cache
def _classes() -> tuple[Any, ...]:
    return (*nibabel_module("imageclasses").all_image_classes, nibabel_module("ecat").EcatImage)


@cache
def extensions() -> tuple[str, ...]:
    return tuple(
        sorted(
            extension + packed
            for image_class in _classes()
            for extension in image_class.valid_exts
            for packed in ("", *image_class._compressed_suffixes)
        )
    )


@contextmanager
def opened(path: str, options: dict[str, Any]) -> Iterator[Any]:
    """The image of a file, its header read; what it keeps open is closed at the end."""
    try:
        image = _open(path, options)
    except (ReadError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, TypeError) and options:
            raise
        raise _explained(path, error) from error
    try:
        for holder in (image.file_map.get("header"), image.file_map["image"]):
            if holder is not None and not os.path.exists(holder.filename):
                raise missing(holder.filename, wanted_by=path)
        yield image
    finally:
        _close(image)


def _open(path: str, options: dict[str, Any]) -> Any:
    lower = path.lower()
    if lower.endswith((".par", ".rec", ".zst")):
        return nibabel_module("loadsave").load(path, **options)
    if options:
        raise TypeError(f"{path}: its format takes no options, and was given {', '.join(options)}")
    if lower.endswith((".mgh", ".mgz")):
        return _open_mgh(path)
    if lower.removesuffix(".gz").removesuffix(".bz2").endswith((".nii", ".hdr", ".img")):
        return _open_nifti(path)
    if lower.endswith(".mnc") and head_of(path, 3) == b"CDF":
        return _open_minc1(path)
    if lower.endswith(".v"):
        if head_of(path, 6) != b"MATRIX":
            raise _unknown(path)
        return nibabel_module("ecat").EcatImage.from_filename(path)
    return nibabel_module("loadsave").load(path)


def _open_nifti(path: str) -> Any:
    # NIfTI, CIFTI-2, Analyze, SPM. The header goes through our streams, as the voxels will: its
    # own openers stop at garbage after a short gzip file, and leave files open when they fail.
    file = _header_file(path)
    check_file(file)
    sniff = head_of(file, _SNIFF)
    if len(sniff) < _SHORTEST and (not sniff or sniff[:4] in _NIFTI_SIZES):
        raise truncated(file, "the end of its header")
    sniffed = (sniff.ljust(_SNIFF, b"\0"), file)
    for image_class in _classes_for(path):
        if image_class.path_maybe_image(path, sniffed)[0]:
            break
    else:
        raise _unknown(path)
    file_map = image_class.filespec_to_file_map(path)
    if "header" in file_map:
        file_map["header"].fileobj = BytesIO(content_of(file))
    else:
        # The extensions of a header go on to where the voxels start.
        version = "Nifti1" if sniff[:4] in _NIFTI1_SIZES else "Nifti2"
        header_class = getattr(nibabel_module(version.lower()), f"{version}Header")
        header = header_class(sniffed[0][: header_class.sizeof_hdr], check=False)
        size = min(int(header["vox_offset"]), _LONGEST)
        file_map["image"].fileobj = BytesIO(head_of(file, max(size, _SNIFF)))
    mat = file_map.get("mat")
    if mat is None or not os.path.exists(mat.filename):
        return image_class.from_file_map(file_map)
    mat.fileobj = BytesIO(content_of(mat.filename))
    try:
        return image_class.from_file_map(file_map)
    except Exception as error:
        raise ReadError(f"{file}, or {mat.filename}, can't be understood ({error})") from error


def _open_mgh(path: str) -> Any:
    # A footer (repetition time, flip angle) follows the voxels. To reach it in a compressed file
    # nibabel decompresses all of them; all else is in the first bytes, so there it is left out.
    head = head_of(path, _MGH_HEADER)
    if len(head) < _MGH_HEADER:
        raise truncated(path, "the end of its header")
    image_class = nibabel_module("freesurfer").MGHImage
    header = image_class.header_class(head)
    if not is_compressed(path):
        with open(path, "rb") as file:
            file.seek(header.get_data_offset() + int(header.get_data_size()))
            footer = file.read(_MGH_FOOTER)
        header = image_class.header_class(head + footer)
    image = image_class(array_proxy()(path, header), header.get_affine(), header)
    image.file_map["image"].filename = path
    return image


def _open_minc1(path: str) -> Any:
    # nibabel would read the voxels with the header; a mapped file gives them when they are asked
    # for. The mapping outlives the open file, and ends with the last array over it.
    image_class = nibabel_module("minc1").Minc1Image
    content = nibabel_module("externals.netcdf").netcdf_file(path, mmap=True)
    content.fp.close()
    minc = nibabel_module("minc1").Minc1File(content)
    shape = minc.get_data_shape()
    header = image_class.header_class(minc.get_data_dtype(), shape, minc.get_zooms())
    image = image_class(image_class.ImageArrayProxy(minc), minc.get_affine(), header)
    image.file_map["image"].filename = path
    return image


def _close(image: Any) -> None:
    proxy = image.dataobj
    minc = getattr(proxy, "minc_file", None)
    candidates: list[Any] = [
        getattr(proxy, "file_like", None),
        getattr(getattr(image, "_subheader", None), "fileobj", None),
        getattr(minc, "_mincfile", None),
    ]
    for candidate in candidates:
        if hasattr(candidate, "close"):
            candidate.close()


def _explained(path: str, error: Exception) -> Exception:
    """What to tell the user when ``path`` could not be opened."""
    if isinstance(error, EOFError):
        return truncated(path, "the end of its header")
    header = _header_file(path)
    if not os.path.exists(header):
        return missing(header, wanted_by=path)
    if isinstance(error, OSError) and error.filename is not None:
        return error
    if type(error).__name__ == "ImageFileError":
        return _unknown(path)
    return ReadError(f"{path}: its header can't be understood ({error})")


def _unknown(path: str) -> UnknownFormatError:
    expected = ", ".join(sorted({format_of(c) for c in _classes_for(path)}))
    return UnknownFormatError(
        f"{path}: by its name it should be {expected}, by its content it is not;"
        " rename it, or pass reader="
    )


def _classes_for(path: str) -> list[Any]:
    root = path.lower()
    for packed in (".gz", ".bz2", ".zst"):
        root = root.removesuffix(packed)
    return [c for c in _classes() if root.endswith(c.valid_exts)]


def _header_file(path: str) -> str:
    for image_class in _classes_for(path):
        if len(image_class.files_types) > 1:
            return str(image_class.filespec_to_file_map(path)["header"].filename)
    return path
