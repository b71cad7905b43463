"""The AIMS that tests run against does what was recorded of the real one; so does the real one."""

from __future__ import annotations

import ast
import copy
import gc
import json
import operator
import os
import pickle
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aims_support import RECORDS, SAMPLES
from support import Running

DTYPES = ("int16", "float32", "uint8", "float64")


def sections() -> dict[str, list[tuple[str, str]]]:
    """The recorded operators: title of a section -> (what was done, what came out)."""
    found: dict[str, list[tuple[str, str]]] = {}
    text = (RECORDS / "operators.txt").read_text()
    for part in re.split(r"^=+ ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        body = re.sub(r"^ +same object.*\n", "", body, flags=re.MULTILINE)
        lines = re.findall(r"^(\S.*?) +(->|!!) (.*(?:\n[ \n].*)*)", body, re.MULTILINE)
        found[title.strip()] = [
            (" ".join(what.split()), f"{mark} {' '.join(out.split())}") for what, mark, out in lines
        ]
    return found


SECTIONS = sections()


def told(function: Any) -> str:
    """What came out, written as in the records."""
    try:
        with np.errstate(all="ignore"):
            value = function()
    except Exception as error:
        return " ".join(f"!! {type(error).__name__}: {error}".split())
    if value is NotImplemented:
        return "-> NotImplemented"
    kind = type(value).__name__
    if kind.startswith("Volume_"):
        return f"-> {kind} " + " ".join(str(np.asarray(value).ravel()[:4]).split())
    if kind == "ndarray":
        return f"-> ndarray {value.dtype} " + " ".join(str(value.ravel()[:4]).split())
    return " ".join(f"-> {kind} {value}".split())


def agree(out: str, recorded: str) -> bool:
    # Messages were cut off; spaces within arrays depend on the widths of numbers.
    if recorded.startswith("!!"):
        return len(recorded) > 20 and out.startswith(recorded)
    return out.replace(" ", "") == recorded.replace(" ", "")


def volume(aims: Any, dtype: Any, shape: tuple[int, ...] = (3, 2, 2, 1)) -> Any:
    values = np.arange(1, 1 + np.prod(shape), dtype=dtype).reshape(shape)
    return aims.Volume(aims.Volume(values))


UNARY = {
    "neg": operator.neg,
    "abs": abs,
    "pos": operator.pos,
    "invert": operator.invert,
    "bool": bool,
    "len": len,
    "iter": lambda vol: list(vol)[:1],
    "float": float,
    "round": round,
    "hash": hash,
    "np.sqrt": np.sqrt,
    "np.exp": np.exp,
    "np.sum": np.sum,
    "np.mean": np.mean,
    "np.asarray": np.asarray,
    "v==v is": lambda vol: vol == vol,
}


def outcome(aims: Any, what: str, dtype: str) -> tuple[str, Any]:
    vol, ndarray = volume(aims, dtype), np.asarray(volume(aims, dtype)).copy()
    same = volume(aims, dtype)
    names = {"np": np, "vol": vol, "v": vol, "ndarray": ndarray, "same": same}
    if what in UNARY:
        return told(lambda: UNARY[what](vol)), vol
    if in_place := re.fullmatch(r"vol (\S+=) (\S+)", what):
        sign, right = in_place.groups()
        if sign not in ("==", "!=", "<=", ">="):
            right = right.replace("vol", "same")

            def change() -> Any:
                exec(f"vol {sign} {right}", names)
                return names["vol"]

            return told(change), names["vol"]
    return told(lambda: eval(what.replace("vol(same type)", "same"), names)), vol


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_give_what_was_recorded(aims: Any, dtype: str) -> None:
    [recorded] = [lines for title, lines in SECTIONS.items() if title.startswith(f"dtype {dtype} ")]
    assert len(recorded) > 200
    wrong = []
    for what, expected in recorded:
        out, _ = outcome(aims, what, dtype)
        if not agree(out, expected):
            wrong.append(f"{what}: {out}, recorded {expected}")
    assert not wrong, "\n".join(wrong)


def test_operators_in_place_give_the_same_object(aims: Any) -> None:
    for sign in ("+=", "-=", "*=", "/=", "//=", "%=", "**=", "&="):
        vol = volume(aims, "int16")
        names = {"vol": vol}
        exec(f"vol {sign} 2", names)
        assert names["vol"] is vol


def test_volumes_of_two_types_give_the_promoted_one(aims: Any) -> None:
    text = (RECORDS / "operators.txt").read_text()
    for left, table in re.findall(r"^(\w+) (\{'\+'.*\})$", text, re.MULTILINE):
        for right, code in ast.literal_eval(table)["+"].items():
            total = volume(aims, left) + volume(aims, right)
            assert type(total).__name__ == f"Volume_{code}", (left, right)
    pairs = [(what, out) for what, out in SECTIONS["mixed"] if re.fullmatch(r"\w+ . \w+", what)]
    assert len(pairs) == 28
    for what, expected in pairs:
        left, sign, right = what.split()
        names = {"a": volume(aims, left), "b": volume(aims, right)}
        out = told(lambda sign=sign, names=names: eval(f"a {sign} b", names))
        assert agree(out, expected), f"{what}: {out}, recorded {expected}"


def test_volumes_of_two_sizes_add_up_without_a_word(aims: Any) -> None:
    for what, expected in SECTIONS["different sizes"]:
        left, sign, right = re.fullmatch(r"(\(.*\)) (.) (\(.*\))", what).groups()  # type: ignore[union-attr]
        other = aims.Volume(aims.Volume(np.ones(ast.literal_eval(right), np.float32)))
        names = {"a": volume(aims, "float32", ast.literal_eval(left)), "b": other}
        assert agree(told(lambda sign=sign, names=names: eval(f"a {sign} b", names)), expected)


def test_dunders_give_what_was_recorded_and_not_implemented(aims: Any) -> None:
    text = (RECORDS / "operators.txt").read_text().partition("dunder calls\n")[2]
    for name in re.findall(r"^(__\w+__) +MISSING", text, re.MULTILINE):
        if name != "__iter__":
            assert not hasattr(volume(aims, "float32"), name), name
    calls = re.findall(r"^v\.(__\w+__)\(([\w.]+)\) +-> (.*)$", text, re.MULTILINE)
    assert len(calls) > 60
    vol = volume(aims, "float32")
    others = {"Volume_FLOAT": volume(aims, "float32"), "Volume_S16": volume(aims, "int16")}
    others |= {"foo": "foo", "None": None, "2": 2}
    for name, given, expected in calls:
        other = others[given] if given in others else ast.literal_eval(given)
        out = told(lambda name=name, other=other: getattr(vol, name)(other))
        assert agree(out, f"-> {expected}"), f"{name}({given}): {out}, recorded {expected}"
    for other in ("foo", None, object(), [1], np.ones((3, 2, 2, 1), np.float32)):
        for name in ("add", "radd", "sub", "mul", "truediv", "div", "rdiv", "iadd", "imul"):
            assert getattr(vol, f"__{name}__")(other) is NotImplemented
    assert type(vol.__rdiv__(2)).__name__ == "Volume_DOUBLE"


@pytest.mark.parametrize("zero", ["v / z", "v % z", "v / 0", "v % 0"])
def test_the_stand_in_dies_where_the_real_one_kills_the_process(stand_in: Any, zero: str) -> None:
    vol = volume(stand_in, "int16")
    names = {"v": vol, "z": stand_in.Volume(stand_in.Volume(np.zeros((3, 2, 2, 1), np.int16)))}
    with pytest.raises(stand_in.KilledError, match="SIGFPE"):
        eval(zero, names)


OBSERVED = json.loads((RECORDS / "observed.json").read_text())
NAMES = sorted(OBSERVED)


@pytest.mark.parametrize("name", NAMES)
def test_the_finder_says_what_was_recorded(aims: Any, name: str) -> None:
    recorded = OBSERVED[name]["finder"]
    finder = aims.Finder()
    assert finder.check(str(SAMPLES / name)) is recorded["check"]
    said = {key: getattr(finder, key)() for key in ("objectType", "dataType", "format")}
    assert said == {key: recorded[key] for key in said}
    header = finder.header()
    assert sorted(header.keys()) == sorted(recorded["header"])
    for key, value in recorded["header"].items():
        assert same_values(header[key], value), key


def same_values(found: Any, recorded: Any) -> bool:
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(map(same_values, found, recorded))
    if isinstance(recorded, float):
        return bool(np.isclose(found, recorded, rtol=1e-6, atol=1e-6))
    return bool(found == recorded)


@pytest.mark.parametrize("name", NAMES)
def test_reading_gives_what_was_recorded(aims: Any, name: str) -> None:
    recorded = OBSERVED[name]
    thing = aims.read(str(SAMPLES / name))
    assert type(thing).__name__ == recorded["type"]
    if recorded["type"].startswith("Volume_"):
        values = np.asarray(thing)
        assert list(values.shape) == recorded["shape"]
        assert values.dtype == recorded["dtype"]
        assert values.flags.f_contiguous is recorded["fortran"]
        assert values.nbytes == recorded["nbytes"]
        assert values.sum(dtype=float) == pytest.approx(recorded["sum"], rel=1e-5)
        np.testing.assert_allclose(values.ravel(order="F")[:4], recorded["first"], rtol=1e-6)
    elif recorded["type"] == "AffineTransformation3d":
        np.testing.assert_array_equal(thing.toMatrix(), recorded["matrix"])
    elif recorded["type"].startswith("AimsTimeSurface"):
        arrays = [np.asarray(part()) for part in (thing.vertex, thing.normal, thing.polygon)]
        assert len(thing) == recorded["steps"]
        shapes = [recorded[key] for key in ("vertices", "normals", "polygons")]
        assert [list(array.shape) for array in arrays] == shapes
        assert sum(array.nbytes for array in arrays) == recorded["nbytes"]
    else:
        assert len(thing) == recorded["steps"]
        assert sum(np.asarray(thing[t]).nbytes for t in range(len(thing))) == recorded["nbytes"]


def test_results_over_an_array_of_numpy_overwrite_it(aims: Any) -> None:
    values = np.arange(1, 13, dtype=np.int16).reshape(3, 2, 2, 1)
    borrowed = aims.Volume(values)
    borrowed + 2
    assert values.ravel()[0] == 3
    own = volume(aims, "int16")
    own + 2
    assert np.asarray(own).ravel()[0] == 1


def test_the_header_of_a_result_is_a_copy_of_that_of_the_left_volume(aims: Any) -> None:
    left, right = volume(aims, "int16"), volume(aims, "int16")
    left.header()["subject"], right.header()["subject"] = "left", "right"
    total = left + right
    assert total.header()["subject"] == "left"
    total.header()["subject"] = "changed"
    assert left.header()["subject"] == "left"


def test_read_changes_the_options_that_it_is_given(aims: Any) -> None:
    options = {"border": 1}
    vol = aims.read(str(SAMPLES / "vol_S16.ima"), options=options)
    assert options != {"border": 1}
    assert np.asarray(vol).shape == (6, 5, 4, 1)
    assert np.asarray(vol.refVolume().get()).shape == (8, 7, 6, 1)
    assert not aims.read(str(SAMPLES / "vol_S16.ima")).refVolume()


def test_parts_of_volumes_are_read(aims: Any) -> None:
    path = str(SAMPLES / "vol4d_S16.nii.gz")
    whole = np.asarray(aims.read(path))
    part = aims.read(path + "?ox=1&sx=2&oz=1&sz=3")
    np.testing.assert_array_equal(np.asarray(part), whole[1:3, :, 1:4])
    np.testing.assert_array_equal(
        np.asarray(aims.read(path, options={"oy": 2, "sy": 1})), whole[:, 2:3]
    )
    np.testing.assert_array_equal(np.asarray(aims.read(path, frame=1)), whole[..., 1:2])
    converted = aims.read(path, dtype="Volume_FLOAT")
    np.testing.assert_array_equal(np.asarray(converted), whole.astype("f4"))


def test_bad_files_fail_as_recorded(aims: Any, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(FileNotFoundError):
        aims.read(str(tmp_path / "absent.ima"))
    with pytest.raises(IsADirectoryError):
        aims.read(str(tmp_path))
    (tmp_path / "text.nii").write_text("hello")
    (tmp_path / "empty.nii").write_bytes(b"")
    for name in ("text.nii", "empty.nii"):
        with pytest.raises(OSError, match="Unknown file format"):
            aims.read(str(tmp_path / name))
    content = (SAMPLES / "vol_S16.nii").read_bytes()
    (tmp_path / "short.nii").write_bytes(content[:-10])
    with pytest.raises(Exception, match=r"^unknown$") as raised:
        aims.read(str(tmp_path / "short.nii"))
    assert type(raised.value) is Exception
    assert capfd.readouterr().err
    with pytest.raises(TypeError):
        aims.read(tmp_path / "short.nii")
    with pytest.raises(OSError, match="Unsupported object type"):
        aims.read(str(SAMPLES / "vol_S16.nii"), dtype="FLOAT")


def test_writing(aims: Any, tmp_path: Path, capfd: Any) -> None:
    vol = volume(aims, "int16")
    for name in ("a.ima", "a.nii", "a.nii.gz"):
        aims.write(vol, str(tmp_path / name))
        again = aims.read(str(tmp_path / name))
        assert type(again) is type(vol)
        np.testing.assert_array_equal(np.asarray(again), np.asarray(vol))
        assert os.path.exists(tmp_path / f"{name}.minf")
    aims.write(vol, str(tmp_path / "a.foo"))
    with pytest.raises(Exception, match=r"^unknown$"):
        aims.write(vol, str(tmp_path / "absent" / "a.ima"))
    for name in ("sphere.mesh", "sphere.gii", "texture.tex", "texture.gii", "shift.trm"):
        thing = aims.read(str(SAMPLES / name))
        aims.write(thing, str(tmp_path / name))
        assert type(aims.read(str(tmp_path / name))) is type(thing)


def test_a_nifti_slope_of_one_makes_floats(aims: Any, tmp_path: Path) -> None:
    import nibabel

    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii")
    finder = aims.Finder()
    finder.check(str(tmp_path / "a.nii"))
    assert finder.dataType() == "FLOAT"
    assert finder.header()["disk_data_type"] == "S16"
    assert type(aims.read(str(tmp_path / "a.nii"))).__name__ == "Volume_FLOAT"


def test_what_can_be_copied_pickled_hashed_and_marked(aims: Any) -> None:
    vol = volume(aims, "int16")
    mesh, texture, motion = (
        aims.read(str(SAMPLES / name)) for name in ("sphere.mesh", "texture.tex", "shift.trm")
    )
    for other in (pickle.loads(pickle.dumps(vol)), copy.copy(vol)):
        np.testing.assert_array_equal(np.asarray(other), np.asarray(vol))
    for thing in (mesh, texture, motion):
        with pytest.raises(Exception, match=r"pickle|no default|convert"):
            pickle.dumps(thing)
        assert type(type(thing)(thing)) is type(thing)
    for thing in (vol, mesh, texture, motion):
        weakref.ref(thing)
        thing.mark = 1
        with pytest.raises(TypeError):
            hash(thing)


def test_arrays_keep_a_volume_and_have_no_base(aims: Any) -> None:
    vol = volume(aims, "int16")
    array = np.asarray(vol)
    assert array.base is None
    assert array.flags.writeable
    array[0] = 7
    assert np.asarray(vol)[0, 0, 0, 0] == 7
    part, ref = array[1:], weakref.ref(vol)
    del vol, array
    assert ref() is not None
    assert part.sum() == sum(range(5, 13))
    del part
    gc.collect()
    assert ref() is None


def test_the_stand_ins_parts_are_garbage_without_their_owner(stand_in: Any) -> None:
    vertex = np.asarray(stand_in.read(str(SAMPLES / "sphere.mesh")).vertex())
    step = stand_in.read(str(SAMPLES / "texture.tex"))[0]
    sizes = stand_in.read(str(SAMPLES / "vol_S16.ima")).header()["volume_dimension"]
    graph = stand_in.Graph()
    graph._vertices.append({"name": "sulcus"})
    [node] = graph.vertices()
    assert node["name"] == "sulcus"
    del graph
    gc.collect()
    assert vertex.view("u1").ravel()[0] == np.asarray(step).view("u1").ravel()[0] == 0xDB
    assert list(sizes) != [6, 5, 4, 1]
    assert node["name"] != "sulcus"


def test_reading_in_threads_needs_plug_ins_loaded_before(stand_in: Any) -> None:
    path = str(SAMPLES / "vol_S16.ima")
    assert isinstance(Running(stand_in.read, path).error(), Exception)
    stand_in.carto.PluginLoader.load()
    assert threading.current_thread() is threading.main_thread()
    assert type(Running(stand_in.read, path).result()).__name__ == "Volume_S16"
