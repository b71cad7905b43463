"""Saving objects of AIMS: by AIMS, with their headers, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from aims_support import SAMPLES
from test_aims_arithmetic import Folder, counting, same

import lazycache as lc
from lazycache import LazyReadData, WriteError
from lazycache.cli import main


@pytest.fixture
def folder(aims: Any, tmp_path: Path) -> Folder:
    return Folder(aims, tmp_path)


@pytest.mark.parametrize("name", ["out.ima", "out.nii", "out.nii.gz"])
def test_a_result_is_saved_by_aims_with_its_header(folder: Folder, name: str) -> None:
    left = folder.volume(counting("int16"))
    left.header()["voxel_size"] = [2.0, 3.0, 4.0, 1.0]
    folder.aims.write(left, str(folder.path / "left.ima"))
    a, b = LazyReadData(folder.path / "left.ima"), folder.proxy(counting("int16"))
    target = folder.path / name
    (a * 2 + b).save(target)
    again = folder.aims.read(str(target))
    same(again, folder.plain(a) * 2 + folder.plain(b))
    assert list(again.header()["voxel_size"]) == [2.0, 3.0, 4.0, 1.0]
    lc.save_all({target: lc.mean([a, b])}, dtype="float32")
    again = LazyReadData(target, reader="aims")
    same(again.data, folder.volume(counting("float32")))
    assert not [name for name in os.listdir(folder.path) if name.startswith(".lazycache")]


def test_the_type_on_disk_is_converted_and_never_wraps(folder: Folder) -> None:
    a = folder.proxy(counting("float32") * 1.4)
    (a + 0.25).save(folder.path / "out.ima", dtype="int16")
    again = folder.aims.read(str(folder.path / "out.ima"))
    same(again, folder.volume(np.rint(counting("float32") * 1.4 + 0.25).astype("int16")))
    with pytest.raises(WriteError, match="uint8"):
        (a * 1000).save(folder.path / "out.ima", dtype="uint8")
    with pytest.raises(WriteError, match="float16"):
        a.save(folder.path / "out.ima", dtype="float16")
    same(folder.aims.read(str(folder.path / "out.ima")), again)
    (a == a).save(folder.path / "same.ima")
    same(
        folder.aims.read(str(folder.path / "same.ima")), folder.volume(np.ones((3, 2, 2, 1), "u1"))
    )


@pytest.mark.parametrize("name", ["out.ima", "out.nii", "out.nii.gz"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_numbers_keep_their_type_and_their_values(
    folder: Folder, name: str, dtype: str
) -> None:
    thirds = np.arange(60, dtype=dtype).reshape(5, 4, 3, 1) / 3
    (folder.proxy(thirds) + 1).save(folder.path / name)
    same(folder.aims.read(str(folder.path / name)), folder.volume(thirds + 1))


def test_one_file_read_by_aims_and_by_others_is_on_two_grids(folder: Folder) -> None:
    path = str(SAMPLES / "vol_FLOAT.nii.gz")
    both = LazyReadData(path) + LazyReadData(path, reader="aims")
    with pytest.raises(lc.GridMismatchError, match="read by AIMS"):
        both.data


def test_the_command_reads_all_images_by_aims_if_one_is_for_aims_alone(folder: Folder) -> None:
    nifti, ima = (str(SAMPLES / name) for name in ("vol_FLOAT.nii.gz", "vol_FLOAT.ima"))
    for images, output in (([nifti, ima], "a.ima"), ([nifti, nifti], "b.ima")):
        target = str(folder.path / output)
        assert main(["eval", "I1 * 2 + I2", *images, "-o", target, "-q"]) == 0
        first, second = (folder.aims.read(image) for image in images)
        same(folder.aims.read(target), first * 2 + second)


@pytest.mark.parametrize(
    ("formula", "options", "expected"),
    [
        ("I1 * 2 + I2", [], lambda values: (values * 3).astype("f4")),
        ("mean(images)", ["--dtype", "float64"], lambda values: values.astype("f8")),
        ("I1 > 3", [], lambda values: (values > 3).astype("u1")),
        ("I1 // 1", ["--dtype", "int16"], lambda values: (values // 1).astype("i2")),
    ],
)
def test_formulas_over_textures_give_textures(
    folder: Folder, formula: str, options: list[str], expected: Any
) -> None:
    values = np.arange(49, dtype="f4")
    folder.aims.write(folder.aims.TimeTexture(values), str(folder.path / "a.tex"))
    image, target = str(folder.path / "a.tex"), str(folder.path / "out.tex")
    assert main(["eval", "-i", image, "-i", image, "-f", formula, "-o", target, *options]) == 0
    found = folder.aims.read(target)
    step = np.asarray(found[0])
    assert (len(found), step.tobytes()) == (1, expected(values).tobytes())
    assert step.dtype == expected(values).dtype


def test_volumes_go_to_other_images_as_arrays(folder: Folder) -> None:
    a = LazyReadData(str(SAMPLES / "vol_S16.nii"), reader="aims")
    (a + 1).save(folder.path / "out.npy")
    np.testing.assert_array_equal(np.load(folder.path / "out.npy"), np.asarray(a)[..., 0] + 1)
    (a + 1).save(folder.path / "out.mgz")
    image = nibabel.load(folder.path / "out.mgz")
    assert image.shape == a.shape[:3]
    np.testing.assert_allclose(image.affine, a.affine, atol=1e-4)


@pytest.mark.parametrize("name", ["sphere.mesh", "texture.tex", "shift.trm"])
def test_other_objects_are_saved_too(folder: Folder, name: str) -> None:
    thing = LazyReadData(str(SAMPLES / name))
    thing.save(folder.path / name)
    assert type(folder.aims.read(str(folder.path / name))) is type(thing.data)
    with pytest.raises(WriteError, match=name.partition(".")[2]):
        thing.save(folder.path / "out.ima")
    assert not (folder.path / "out.ima").exists()


def test_what_can_not_be_written_is_told_before_anything_is_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = folder.proxy(counting("float32"))
    with lc.DataCache("64MiB") as cache:
        for name, text in [
            ("out.foo", "can't write this kind"),
            ("out.mesh", "AIMS writes it as .ima"),
            ("absent/out.ima", "there is no folder"),
            (a.filename, "is an input"),
            (str(a.filename).replace(".ima", ".dim"), "can't write this kind"),
        ]:
            with pytest.raises(WriteError, match=text):
                (a + 1).save(folder.path / name)
        with pytest.raises(WriteError, match="is an array"):
            np.sqrt(a).save(folder.path / "out.ima")
        assert cache.stats().loads == 0


def test_a_failure_of_aims_leaves_what_was_there(
    folder: Folder, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = folder.proxy(counting("float32"))
    target = folder.path / "out.ima"
    (a + 1).save(target)
    before = sorted(os.listdir(folder.path))

    def fails(value: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise Exception("unknown")

    monkeypatch.setattr(stand_in, "write", fails)
    with pytest.raises(WriteError, match=r"out.ima: AIMS can't write it \(unknown\)"):
        (a + 2).save(target)
    monkeypatch.setattr(stand_in, "write", lambda value, path, **options: None)
    with pytest.raises(WriteError, match="AIMS wrote nothing"):
        (a + 2).save(target)
    monkeypatch.undo()
    assert sorted(os.listdir(folder.path)) == before
    same(stand_in.read(str(target)), folder.plain(a) + 1)


def test_without_aims_its_formats_are_refused(no_aims: None, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"soma\.aims isn't installed"):
        (LazyReadData(np.ones((4, 4, 4))) + 1).save(tmp_path / "out.ima")


def test_the_command_writes_what_aims_writes(folder: Folder, capsys: Any) -> None:
    files = [folder.write(counting("int16"), "left"), folder.write(counting("int16") * 2)]
    target = folder.path / "sum.ima"
    assert main(["eval", *files, "-o", f"{target}=I1 * 2 + I2"]) == 0
    again = folder.aims.read(str(target))
    same(again, folder.volume(counting("int16") * 4))
    assert again.header()["subject"] == "left"
    assert main(["eval", *files, "-o", f"{folder.path / 'out.foo'}=I1 + I2"]) == 2
    assert "can't write this kind" in capsys.readouterr().err
