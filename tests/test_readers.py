"""Which reader takes a file, callables as readers, and what is said of bad files."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lazycache import readers
from lazycache.errors import (
    PluginWarning,
    ReadError,
    TruncatedFileError,
    UnknownFormatError,
)
from lazycache.readers import Probe, Reader, as_reader, reader_for, register_reader


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a registry of its own, without the plug-ins of this machine."""
    monkeypatch.setattr(readers, "_registered", ())
    monkeypatch.setattr(readers, "_plugins", ())


class OnesReader:
    """A whole reader of files called ``*.ones``."""

    def __init__(self, name: str = "ones") -> None:
        self.name = name

    def can_read(self, path: str) -> bool:
        return path.endswith(".ones")

    def probe(self, path: str, **options: Any) -> Probe:
        return Probe("ones", (2,), np.dtype(float), 16, 16, (path,))

    def read(self, path: str, **options: Any) -> np.ndarray:
        return np.ones(2)


@pytest.fixture
def volume(tmp_path: Path) -> str:
    path = str(tmp_path / "volume.nii.gz")
    nib.save(nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)), path)
    return path


# --- the registry


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.npy", "numpy"),
        ("A.NPZ", "numpy"),
        ("a.nii", "nibabel"),
        ("A.NII.GZ", "nibabel"),
        ("a.img", "nibabel"),
        ("a.hdr.gz", "nibabel"),
        ("a.nii.bz2", "nibabel"),
        ("a.mgz", "nibabel"),
        ("a.mnc", "nibabel"),
        ("a+orig.HEAD", "nibabel"),
        ("a+orig.BRIK.gz", "nibabel"),
        ("a.PAR", "nibabel"),
        ("a.surf.gii", "nibabel"),
        ("a.dscalar.nii", "nibabel"),
        ("a.v", "nibabel"),
    ],
)
def test_the_extension_chooses_the_reader(path: str, name: str) -> None:
    assert reader_for(path).name == name


def test_a_registered_reader_is_asked_before_ours(volume: str) -> None:
    class Mine(OnesReader):
        def can_read(self, path: str) -> bool:
            return path.endswith(".nii.gz")

    mine = Mine("mine")
    register_reader(mine)
    assert reader_for(volume) is mine
    assert reader_for(volume, "nibabel").name == "nibabel"


def test_the_latest_registered_is_asked_first_and_replaces_its_namesake() -> None:
    old, new, other = OnesReader(), OnesReader(), OnesReader("other")
    register_reader(old)
    register_reader(other)
    assert reader_for("a.ones") is other
    register_reader(new)
    assert reader_for("a.ones") is new
    assert reader_for("a.ones", "ones") is new


def test_only_readers_can_be_registered() -> None:
    with pytest.raises(TypeError, match="needs name, can_read"):
        register_reader(len)  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownFormatError, match=r"called 'minc'.* aims, nibabel, numpy"):
        reader_for("a.nii", "minc")


def test_a_can_read_that_raises_is_named_and_passed_over(volume: str) -> None:
    class Broken(OnesReader):
        def can_read(self, path: str) -> bool:
            raise KeyError("oops")

    register_reader(Broken("broken"))
    with pytest.warns(PluginWarning, match="'broken' is skipped .*can_read failed"):
        assert reader_for(volume).name == "nibabel"


def test_our_readers_are_one_value_wherever_they_were_pickled() -> None:
    for name in ("numpy", "nibabel"):
        reader = reader_for("a", name)
        copy = pickle.loads(pickle.dumps(reader))
        assert copy == reader
        assert hash(copy) == hash(reader)
    assert reader_for("a", "numpy") != reader_for("a", "nibabel")


# --- callables and objects


def read_text(path: str, **options: Any) -> str:
    return Path(path).read_text(encoding="utf8") + options.get("end", "")


def test_any_callable_is_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello", encoding="utf8")
    reader = as_reader(read_text)
    assert isinstance(reader, Reader)
    assert reader.name == "read_text"
    assert reader.can_read(str(path))
    assert reader.read(str(path), end="!") == "hello!"
    probe = reader.probe(str(path), end="!")
    assert (probe.shape, probe.dtype) == (None, None)
    assert (probe.nbytes, probe.peak_nbytes, probe.files) == (5, 5, (str(path),))


def test_an_object_with_read_is_a_reader(tmp_path: Path) -> None:
    class Source:
        name = "a source"

        def read(self, filename: str, **options: Any) -> tuple[str, dict[str, Any]]:
            return filename, options

    reader = as_reader(Source())
    assert reader.name == "a source"
    assert reader.read("x", frame=1) == ("x", {"frame": 1})


def test_a_reader_is_taken_as_it_is_and_a_name_is_looked_up() -> None:
    mine = OnesReader()
    assert as_reader(mine) is mine
    assert as_reader("numpy", "a.nii").name == "numpy"


@pytest.mark.parametrize("obj", [3, None, object()])
def test_what_can_not_read_is_refused(obj: object) -> None:
    with pytest.raises(TypeError, match="a function of a path"):
        as_reader(obj)


def test_two_wraps_of_one_callable_are_equal() -> None:
    class Source:
        def read(self, path: str) -> str:
            return path

        def other(self, path: str) -> str:
            return path

    source, twin = Source(), Source()
    same = [
        (read_text, read_text),
        (source, source),
        (source.other, source.other),
        (source.read, source.read),
    ]
    for one, two in same:
        assert as_reader(one) == as_reader(two)
        assert hash(as_reader(one)) == hash(as_reader(two))
    different = [
        (read_text, len),
        (source, twin),
        (source.read, source.other),
        (source.read, twin.read),
        (lambda path: 1, lambda path: 1),
    ]
    for one, two in different:
        assert as_reader(one) != as_reader(two)
    assert as_reader(read_text) != read_text


def test_a_wrap_keeps_its_callable_alive() -> None:
    seen = set()
    kept = []
    for number in range(50):
        reader = as_reader(lambda path, number=number: number)
        kept.append(reader)
        seen.add(reader)
        gc.collect(0)
    assert len(seen) == 50
    assert [reader.read("") for reader in kept] == list(range(50))


def test_a_wrap_of_an_importable_function_pickles_to_an_equal_one() -> None:
    reader = as_reader(os.path.getsize)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy == reader
    assert copy.name == reader.name


def test_the_size_of_what_a_callable_gives_is_that_of_the_volume_in_the_file(volume: str) -> None:
    assert as_reader(read_text).probe(volume).nbytes == 48


def test_the_size_is_else_guessed_from_the_bytes_on_disk(tmp_path: Path) -> None:
    packed = tmp_path / "a.raw.gz"
    packed.write_bytes(bytes(100))
    assert as_reader(read_text).probe(str(packed)).nbytes == 400
    foreign = tmp_path / "a.nii"
    foreign.write_bytes(bytes(100))
    assert as_reader(read_text).probe(str(foreign)).nbytes == 100


def test_a_callable_may_read_a_folder(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / name).write_bytes(bytes(10))
    probe = as_reader(os.listdir).probe(str(tmp_path))
    assert probe.nbytes == 20
    assert probe.files == tuple(str(p) for p in (tmp_path, tmp_path / "a", tmp_path / "b"))


def test_a_callables_error_is_its_own_and_names_the_file(volume: str) -> None:
    def fail(path: str) -> None:
        raise KeyError("no such thing")

    with pytest.raises(KeyError) as caught:
        as_reader(fail).read(volume)
    assert any(volume in note for note in caught.value.__notes__)


# --- bad files


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npy", "a.gii", "a.mgz", "a.xyz"])
def test_a_missing_file_is_file_not_found_with_its_name(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(FileNotFoundError) as caught:
        reader_for(path).probe(path)
    assert caught.value.filename == path


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npy", "a.gii", "a.mgz", "a.xyz"])
def test_a_directory_is_named_as_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        reader_for(str(path)).read(str(path))
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.npy", "a.npz", "a.gii", "a.mnc", "a.xyz"])
def test_an_empty_file_is_truncated(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(TruncatedFileError, match=f"{name} is empty"):
        reader_for(str(path)).probe(str(path))


def test_a_file_that_may_not_be_read_is_a_permission_error(
    volume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As root every file may be read, so the question is answered for the test.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError) as caught:
        reader_for(volume).probe(volume)
    assert caught.value.filename == volume


@pytest.mark.parametrize(
    "name",
    ["a.nii", "a.img", "a.hdr", "a.mnc", "a.mgh", "a.par", "a.gii", "a+o.HEAD", "a.v", "a.npy"],
)
def test_text_with_an_images_name_is_no_image(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("subject,age\n" * 100, encoding="utf8")
    for sibling in ("a.img", "a.hdr", "a.rec", "a+o.BRIK"):
        (tmp_path / sibling).write_text("subject,age\n" * 100, encoding="utf8")
    with pytest.raises(ReadError, match=r"a[.+]"):
        reader_for(str(path)).probe(str(path))


@pytest.mark.parametrize("name", ["a.nii", "a.img", "a.gii", "a.npy", "a.npz", "a.v"])
def test_text_with_an_images_name_is_an_unknown_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("subject,age\n" * 100, encoding="utf8")
    (tmp_path / "a.hdr").write_text("subject,age\n" * 100, encoding="utf8")
    with pytest.raises(UnknownFormatError, match=r"a\..*its (name|content)"):
        reader_for(str(path)).probe(str(path))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz", "a.nii.bz2", "a.gii.gz"])
def test_a_compressed_name_on_plain_content_says_to_rename(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(1000))
    with pytest.raises(UnknownFormatError, match=r"compressed, its content is not; rename"):
        reader_for(str(path)).probe(str(path))


def test_an_unknown_extension_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("?", encoding="utf8")
    with pytest.raises(UnknownFormatError, match=r"a\.xyz: no reader takes .* pass reader="):
        reader_for(str(path))


@pytest.mark.parametrize(("name", "lost"), [("a.img", "a.hdr"), ("a.hdr", "a.img")])
def test_half_a_pair_names_the_missing_half(tmp_path: Path, name: str, lost: str) -> None:
    nib.save(nib.Nifti1Pair(np.ones((2, 2, 2), np.int16), np.eye(4)), tmp_path / "a.img")
    (tmp_path / lost).unlink()
    path = str(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"{name} needs it") as caught:
        reader_for(path).probe(path)
    assert caught.value.filename == str(tmp_path / lost)
