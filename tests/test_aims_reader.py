"""Reading through AIMS: sizes, errors, parts, and what keeps what alive."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from aims_support import RECORDS, SAMPLES, STAND_IN
from support import Running, together

import lazycache as lc
from lazycache import readers
from lazycache._buffers import owner_of
from lazycache.cli import main
from lazycache.readers import aims as aims_reader
from lazycache.readers import reader_for
from lazycache.readers.aims import AimsReader
from lazycache.sizes import nbytes_of
from lazycache.source import file_key
from lazycache.testing import check_reader

OBSERVED = json.loads((RECORDS / "observed.json").read_text())
READER = AimsReader()


def sample(name: str) -> str:
    return str(SAMPLES / name)


def big(aims: Any, path: Path, dtype: str = "f4", sides: tuple[int, ...] = (20, 21, 22)) -> str:
    """A volume that AIMS wrote, as a file."""
    # Values that AIMS doesn't write as scaled integers.
    values = (np.random.default_rng(0).random((*sides, 1)) * 100).astype(dtype)
    aims.write(aims.Volume(aims.Volume(values)), str(path))
    return str(path)


FOLD = """*BEGIN NODE fold {n}
bottom_point_number 1
name                s{n}
point_number        3
size                {n}
skeleton_label      {n}
ss_point_number     2
*END

"""


def graph_file(folder: Path) -> str:
    path = folder / "sulci.arg"
    nodes = "".join(FOLD.format(n=n) for n in range(1, 51))
    path.write_text(
        "# graph 1.0\n\n*BEGIN GRAPH CorticalFoldArg\nboundingbox_max 9 9 9\n"
        f"boundingbox_min 0 0 0\nvoxel_size      1 1 1\n\n{nodes}*END\n"
    )
    (folder / "sulci.data").mkdir()
    (folder / "sulci.data" / "fold_0.mesh").write_bytes((SAMPLES / "sphere.mesh").read_bytes())
    return str(path)


def bucket_file(folder: Path, count: int = 30) -> str:
    path = folder / "points.bck"
    voxels = np.arange(3 * count, dtype="<i2").tobytes()
    start = b"binarDCBA" + struct.pack("<I4s4f3I", 4, b"VOID", 1, 1, 1, 1, 1, 0, count)
    path.write_bytes(start + voxels)
    return str(path)


# Before reading


@pytest.mark.parametrize("name", sorted(OBSERVED))
def test_the_reader_keeps_the_contract(aims: Any, tmp_path: Path, name: str) -> None:
    check_reader(READER, sample(name))


@pytest.mark.parametrize("make", [graph_file, bucket_file])
def test_the_reader_keeps_the_contract_for_graphs_and_buckets(
    aims: Any, tmp_path: Path, make: Any
) -> None:
    check_reader(READER, make(tmp_path))


@pytest.mark.parametrize("options", [{"border": 2}, {"ox": 1, "sx": 3}, {"frame": 1}])
def test_the_reader_keeps_the_contract_for_parts(aims: Any, options: dict[str, int]) -> None:
    check_reader(READER, sample("vol4d_S16.nii.gz"), **options)


@pytest.mark.parametrize("name", sorted(OBSERVED))
def test_sizes_are_known_before_reading(aims: Any, name: str) -> None:
    probe, recorded = READER.probe(sample(name)), OBSERVED[name]
    assert probe.kind == recorded["type"]
    assert probe.format == recorded["finder"]["format"]
    if "nbytes" in recorded:
        assert probe.nbytes == recorded["nbytes"] == nbytes_of(READER.read(sample(name)))
    if "shape" in recorded:
        assert list(probe.shape or ()) == recorded["shape"]
        assert probe.dtype == recorded["dtype"]
        assert probe.order == "F"


@pytest.mark.parametrize("code", ["U16", "S32", "U32", "CFLOAT", "RGB", "RGBA"])
def test_volumes_of_all_types_have_the_sizes_foretold(aims: Any, tmp_path: Path, code: str) -> None:
    path = str(tmp_path / "a.ima")
    aims.write(aims.Volume(5, 4, 3, 2, dtype=code), path)
    volume = READER.read(path)
    assert type(volume).__name__ == READER.probe(path).kind == f"Volume_{code}"
    assert nbytes_of(volume) == READER.probe(path).nbytes == np.asarray(volume).nbytes


def test_five_axes(aims: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "a.ima")
    aims.write(aims.Volume([4, 3, 2, 5, 6], dtype="S16"), path)
    assert READER.probe(path).shape == (4, 3, 2, 5, 6)
    check_reader(READER, path)


@pytest.mark.parametrize(
    ("name", "dtype", "slope", "times"),
    [
        ("a.nii", "f4", 0, 2.01),
        ("a.nii.gz", "i2", 0, 2.01),
        ("a.nii", "i2", 1, 1.5),
        ("a.nii", "u1", 1, 1.25),
        ("a.ima", "f4", 0, 1.05),
    ],
)
def test_the_peak_while_reading_is_what_was_observed(
    aims: Any, tmp_path: Path, name: str, dtype: str, slope: int, times: float
) -> None:
    path = tmp_path / name
    if slope:
        values = np.zeros((20, 21, 22), dtype)
        nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)  # writes a slope of 1
    else:
        big(aims, path, dtype)
    probe = READER.probe(str(path))
    assert probe.peak_nbytes / probe.nbytes == pytest.approx(times, abs=0.015)


@pytest.mark.parametrize("extension", ["tex", "gii"])
def test_textures_of_several_steps_have_the_sizes_foretold(
    aims: Any, tmp_path: Path, extension: str
) -> None:
    path = str(tmp_path / f"a.{extension}")
    aims.write(aims.TimeTexture(np.arange(60, dtype="f4").reshape(20, 3)), path)
    assert READER.probe(path).nbytes == nbytes_of(READER.read(path)) == 3 * 20 * 4


def test_meshes_of_several_steps_have_the_sizes_foretold(aims: Any, tmp_path: Path) -> None:
    content = (SAMPLES / "sphere.mesh").read_bytes()
    path = tmp_path / "a.mesh"
    again = struct.pack("<I", 1) + content[29:]
    path.write_bytes(content[:21] + struct.pack("<I", 2) + content[25:] + again)
    probe = READER.probe(str(path))
    assert probe.nbytes == nbytes_of(READER.read(str(path))) == 2 * 2184


def test_a_slope_is_why_voxels_are_floats(aims: Any, tmp_path: Path) -> None:
    nibabel.Nifti1Image(np.zeros((2, 3, 4), "i2"), np.eye(4)).to_filename(tmp_path / "a.nii")
    probe = READER.probe(str(tmp_path / "a.nii"))
    assert (probe.kind, probe.dtype) == ("Volume_FLOAT", np.float32)
    assert "S16 on disk" in probe.dtype_reason


def test_the_affine_places_voxels_where_nibabel_does(aims: Any) -> None:
    path = sample("vol_S16.nii")
    ours, theirs = READER.probe(path), reader_for(path).probe(path)
    assert ours.affine is not None
    assert theirs.affine is not None
    volume = np.asarray(READER.read(path))[..., 0]
    place = ours.affine @ [2, 3, 1, 1]
    voxel = np.rint(np.linalg.solve(theirs.affine, place))[:3].astype(int)
    assert volume[2, 3, 1] == reader_for(path).read(path)[tuple(voxel)]
    cut = READER.probe(path, ox=2, sx=1, oy=3, sy=2)
    assert cut.affine is not None
    np.testing.assert_allclose(cut.affine @ [0, 0, 1, 1], place)


def test_a_transformation_beside_a_graph_counts_its_files(aims: Any, tmp_path: Path) -> None:
    path = graph_file(tmp_path)
    probe = READER.probe(path)
    assert str(tmp_path / "sulci.data" / "fold_0.mesh") in probe.files
    assert nbytes_of(READER.read(path)) > 50 * 512
    assert 0.1 < nbytes_of(READER.read(path)) / probe.nbytes < 10


def test_side_files_are_part_of_the_state_of_a_file(aims: Any, tmp_path: Path) -> None:
    path = big(aims, tmp_path / "a.ima")
    with lc.DataCache("10MiB"):
        proxy = lc.load(path)
        proxy.data
        minf = tmp_path / "a.ima.minf"
        minf.write_text(minf.read_text() + "\n")
        with pytest.warns(lc.FileChangedWarning, match=r"a\.ima"):
            lc.load(path).data
    assert set(READER.probe(path).files) == {path, path[:-4] + ".dim", path + ".minf"}


# Bad files


def test_a_missing_file_and_a_folder_are_named(aims: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.ima"):
        lc.load(tmp_path / "absent.ima").data
    (tmp_path / "folder.ima").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.ima"):
        lc.load(tmp_path / "folder.ima").data


def test_a_volume_without_its_dim_says_so(aims: Any, tmp_path: Path) -> None:
    shutil.copy(sample("vol_S16.ima"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vol_S16\.dim"):
        lc.load(tmp_path / "vol_S16.ima").data


@pytest.mark.parametrize("name", ["sphere.mesh", "texture.tex", "vol_S16.ima", "vol_S16.nii"])
def test_truncated_files_are_refused_before_aims_reads_them(
    aims: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copy(sample(name), tmp_path)
    if name.endswith(".ima"):
        shutil.copy(sample("vol_S16.dim"), tmp_path)
    content = (tmp_path / name).read_bytes()
    monkeypatch.setattr(aims.Reader, "read", lambda *_, **__: pytest.fail("AIMS read it"))
    for kept in (len(content) - 1, len(content) // 2 + 60):
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(lc.TruncatedFileError, match=name.replace(".", r"\.")):
            lc.load(tmp_path / name, reader="aims").data


def test_a_dim_that_aims_would_never_come_to_the_end_of_is_refused(
    aims: Any, tmp_path: Path
) -> None:
    path = big(aims, tmp_path / "a.ima")
    dim = tmp_path / "a.dim"
    dim.write_text(dim.read_text().rstrip())
    with pytest.raises(lc.TruncatedFileError, match=r"a\.dim"):
        lc.load(path).data


@pytest.mark.parametrize("make", [graph_file, bucket_file])
def test_truncated_graphs_and_buckets_are_refused(aims: Any, tmp_path: Path, make: Any) -> None:
    path = Path(make(tmp_path))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(lc.TruncatedFileError, match=path.name):
        lc.load(path).data


def test_a_mesh_that_counts_more_than_it_has_is_refused(aims: Any, tmp_path: Path) -> None:
    content = bytearray((SAMPLES / "sphere.mesh").read_bytes())
    content[29:33] = struct.pack("<I", 4_000_000_000)
    (tmp_path / "a.mesh").write_bytes(content)
    with pytest.raises(lc.TruncatedFileError, match="4000000000 items"):
        lc.load(tmp_path / "a.mesh").data


def test_meshes_in_words_are_counted_as_well(tmp_path: Path) -> None:
    from lazycache.readers import aims_files

    points = "(0 ,0 ,0) (1 ,0 ,0) (0 ,1 ,0) "
    text = f"ascii\nVOID\n3\n1\n0\n3\n{points}\n3\n{points}\n0\n1\n(0 ,1 ,2)\n"
    path = tmp_path / "a.mesh"
    path.write_text(text)
    assert aims_files.mesh(str(path)) == 3 * 24 + 12
    path.write_text(text[:-12])
    with pytest.raises(lc.TruncatedFileError, match=r"a\.mesh"):
        aims_files.mesh(str(path))


def test_unknown_becomes_one_error_with_the_file_and_the_noise(
    aims: Any, tmp_path: Path, capfd: Any
) -> None:
    content = (SAMPLES / "vol_S16.nii.gz").read_bytes()
    path = tmp_path / "short.nii.gz"
    path.write_bytes(content[:-60])
    with pytest.raises(lc.ReadError, match=r"short\.nii\.gz.*unknown") as raised:
        lc.load(path, reader="aims").data
    if threading.active_count() == 1:
        assert not capfd.readouterr().err
        assert "voxels" in str(raised.value) or aims.__dict__.get("IS_STAND_IN") is None
    assert str(raised.value).count(str(path)) >= 1


def test_noise_about_a_file_that_was_read_is_not_swallowed(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    import os

    real = stand_in.Reader.read

    def noisy(self: Any, *args: Any, **kwargs: Any) -> Any:
        os.write(2, b"a warning of AIMS\n")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(stand_in.Reader, "read", noisy)
    READER.read(sample("vol_S16.ima"))
    assert "a warning of AIMS" in capfd.readouterr().err


def test_what_aims_does_not_know_says_so(aims: Any, tmp_path: Path) -> None:
    (tmp_path / "text.nii").write_text("hello, this is no image at all")
    with pytest.raises(lc.UnknownFormatError, match=r"text\.nii"):
        lc.load(tmp_path / "text.nii", reader="aims").data


# Who reads what


def test_aims_is_chosen_for_what_only_it_reads(aims: Any) -> None:
    for name in ("vol_S16.ima", "sphere.mesh", "texture.tex", "shift.trm"):
        assert type(lc.load(sample(name)).data).__name__ == OBSERVED[name]["type"]
    assert isinstance(lc.load(sample("vol_S16.nii")).data, np.ndarray)
    assert isinstance(lc.load(sample("sphere.gii")).data, nibabel.GiftiImage)


def test_aims_is_chosen_for_nifti_by_name_by_a_reader_and_by_arguments(aims: Any) -> None:
    path = sample("vol_S16.nii")
    context = aims.carto.AllocatorContext()
    for proxy in (
        lc.load(path, reader="aims"),
        lc.load(path, reader=aims.Reader()),
        lc.load(path, allocator_context=context),
        lc.load(path, read_options={"border": 1}),
        lc.load(path, border=1),
        lc.load(path + "?ox=1&sx=2"),
        pickle.loads(pickle.dumps(lc.load(path, border=1))),
    ):
        assert type(proxy.data).__name__ == "Volume_S16"
    for proxy in (lc.load(path, dtype="Volume_FLOAT"), lc.load(path, np.dtype, dtype="f4")):
        if proxy.allocator_context is None:
            assert type(proxy.data).__name__ == "Volume_FLOAT"
    copied = pickle.loads(pickle.dumps(lc.load(path, dtype="Volume_FLOAT")))
    assert type(copied.data).__name__ == "Volume_FLOAT"


def test_aims_can_be_made_the_first_to_be_asked(aims: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_registered", ())
    lc.register_reader("aims")
    assert reader_for("a.nii").name == "aims"
    assert reader_for("a.npy").name == "numpy"
    assert type(lc.load(sample("vol_U8.nii")).data).__name__ == "Volume_U8"


def test_without_aims_the_error_says_where_to_get_it(no_aims: None) -> None:
    with pytest.raises(lc.UnknownFormatError, match=r"vol_S16\.ima.*brainvisa\.info"):
        lc.load(sample("vol_S16.ima")).data
    assert lc.load(sample("vol_S16.nii")).data.shape == (6, 5, 4)


def test_aims_is_not_imported_by_who_does_not_need_it() -> None:
    code = (
        "import sys, lazycache as lc\n"
        f"lc.load({sample('vol_S16.nii')!r}).data\n"
        "assert 'soma' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": f"{STAND_IN}:{Path(lc.__file__).parents[1]}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=100)


def test_info_tells_what_a_file_of_aims_holds(aims: Any, capsys: Any) -> None:
    assert main(["info", sample("vol_S16.ima"), sample("sphere.mesh")]) == 0
    told = capsys.readouterr().out
    assert "Volume_S16" in told
    assert "6 x 5 x 4 x 1" in told
    assert "AimsTimeSurface_3_VOID" in told
    assert main(["info", "--json", sample("sphere.mesh")]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kind"] == "AimsTimeSurface_3_VOID"


# What is asked of AIMS


def test_options_are_passed_and_never_changed(aims: Any) -> None:
    options = {"border": 2}
    reader = aims.Reader(options=options)
    for proxy in (
        lc.load(sample("vol_S16.ima"), read_options=options),
        lc.load(sample("vol_S16.ima"), options=options),
        lc.load(sample("vol_S16.ima"), reader=reader),
    ):
        assert np.asarray(proxy.data.refVolume().get()).shape == (10, 9, 8, 1)
        assert options == {"border": 2}
        assert reader.options is options


@pytest.mark.parametrize(
    ("asked", "shape", "memory"),
    [
        ({"border": 2}, (6, 5, 4, 3), 10 * 9 * 8 * 3),
        ({"ox": 1, "sx": 2, "oz": 1}, (2, 5, 3, 3), 2 * 5 * 3 * 3),
        ({"frame": 2}, (6, 5, 4, 1), 6 * 5 * 4),
        ({"options": {"oy": 1, "sy": 1, "border": 1}}, (6, 1, 4, 3), 8 * 3 * 6 * 3),
    ],
)
def test_borders_and_parts_are_accounted_at_their_true_size(
    aims: Any, asked: dict[str, Any], shape: tuple[int, ...], memory: int
) -> None:
    with lc.DataCache("1MiB") as cache:
        proxy = lc.load(sample("vol4d_S16.nii.gz"), reader="aims", **asked)
        assert file_key(proxy.filename, "aims", asked).probe().nbytes == 2 * memory
        assert np.asarray(proxy).shape == shape
        assert cache.used == 2 * memory


def test_a_part_written_in_the_path_is_accounted_at_its_true_size(aims: Any) -> None:
    with lc.DataCache("1MiB") as cache:
        proxy = lc.load(sample("vol_S16.ima") + "?ox=2&sx=3")
        assert proxy.data.shape == (3, 5, 4, 1)
        assert cache.used == 3 * 5 * 4 * 2


def test_the_allocator_context_is_handed_on(aims: Any) -> None:
    with pytest.raises(TypeError, match="allocmode"):
        lc.load(sample("vol_S16.ima"), allocator_context="no context").data


def test_a_part_outside_is_refused(aims: Any) -> None:
    with pytest.raises(lc.ReadError, match=r"vol_S16\.ima.*from 4 on there are no 3 voxels"):
        lc.load(sample("vol_S16.ima") + "?ox=4&sx=3").data
    with pytest.raises(lc.ReadError, match="no frame 7"):
        lc.load(sample("vol4d_S16.nii.gz"), frame=7).data


def test_dtype_converts_volumes_and_nothing_else(aims: Any) -> None:
    with lc.DataCache("1MiB") as cache:
        probe = file_key(sample("vol_S16.ima"), dtype="Volume_DOUBLE").probe()
        assert (probe.kind, probe.nbytes) == ("Volume_DOUBLE", 6 * 5 * 4 * 8)
        proxy = lc.load(sample("vol_S16.ima"), dtype=np.float64)
        assert type(proxy.data).__name__ == "Volume_DOUBLE"
        assert cache.used == 6 * 5 * 4 * 8
    with pytest.raises(lc.ReadError, match=r"no volumes of float16"):
        lc.load(sample("vol_S16.ima"), dtype=np.float16).data
    with pytest.raises(lc.ReadError, match=r"sphere\.mesh is a Mesh"):
        lc.load(sample("sphere.mesh"), dtype=np.float32).data


def test_plug_ins_are_loaded_once_before_any_thread_reads(stand_in: Any) -> None:
    proxies = [lc.load(sample("vol_S16.ima")) for _ in range(3)]
    assert stand_in.carto.PluginLoader._calls == 1
    assert type(Running(lambda: proxies[0].data).result()).__name__ == "Volume_S16"
    lc.load(sample("sphere.mesh")).data
    assert stand_in.carto.PluginLoader._calls == 1


def test_threads_that_come_first_load_plug_ins_once(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aims_reader, "_ready", None)
    volumes = together(4, lambda _: READER.read(sample("vol_S16.ima")))
    assert {type(volume).__name__ for volume in volumes} == {"Volume_S16"}
    assert stand_in.carto.PluginLoader._calls == 1


def test_a_budget_counts_what_aims_objects_hold(aims: Any, tmp_path: Path) -> None:
    paths = [big(aims, tmp_path / f"{n}.ima") for n in range(4)]
    nbytes = 20 * 21 * 22 * 4
    with lc.DataCache(int(2.5 * nbytes), strict=True) as cache:
        for path in paths:
            lc.load(path).data
            assert cache.used <= 2.5 * nbytes
        assert cache.used == 2 * nbytes
        assert cache.stats().evictions == 2
        assert cache.stats().untracked_bytes == 0


def test_loops_read_aims_objects_ahead_within_the_budget(aims: Any, tmp_path: Path) -> None:
    nbytes = 20 * 21 * 22 * 4
    paths = [big(aims, tmp_path / f"{n}.ima") for n in range(8)]
    with lc.DataCache(4 * nbytes, strict=True) as cache:
        proxies = lc.PreloadList(map(lc.load, paths), npreload=8)
        sums = [float(np.asarray(proxy).sum(dtype=float)) for proxy in proxies]
        assert cache.stats().loads == 8
        assert cache.stats().peak_bytes <= 4 * nbytes
    assert sums == [float(np.asarray(aims.read(path)).sum(dtype=float)) for path in paths]


def test_a_volume_that_is_held_outside_stays_charged_and_is_not_read_again(
    aims: Any, tmp_path: Path
) -> None:
    path = big(aims, tmp_path / "a.ima")
    with lc.DataCache("1MiB") as cache:
        proxy = lc.load(path)
        held = proxy.data
        proxy.release()
        assert cache.used == nbytes_of(held)
        assert proxy.data is held
        assert cache.stats().loads == 1
        proxy.release()
        del held
        gc.collect()
        assert cache.used == 0


def test_volumes_in_memory_are_charged(aims: Any) -> None:
    volume = aims.Volume(aims.Volume(np.zeros((100, 100, 100), "f4")))
    with lc.DataCache("100MiB"):
        assert nbytes_of(volume) == 4_000_000
        assert nbytes_of({"some": [volume]}) >= 4_000_000


# What keeps what alive


def test_an_array_of_a_volume_is_read_only_and_owned_by_the_volume(
    aims: Any, tmp_path: Path
) -> None:
    path = big(aims, tmp_path / "a.ima")
    with lc.DataCache("1MiB") as cache:
        proxy = lc.load(path)
        for array in (np.asarray(proxy), proxy.np, proxy[0]):
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
        array = np.asarray(proxy)[2:]
        assert owner_of(array) is proxy.data
        assert nbytes_of(array) == nbytes_of(proxy.data) == cache.used
        before = array.copy()
        gone = weakref.ref(proxy.data)
        proxy.release()
        assert gone() is not None
        assert cache.used == 20 * 21 * 22 * 4
        np.testing.assert_array_equal(array, before)
        del array
        gc.collect()
        assert gone() is None
        assert cache.used == 0


@pytest.mark.parametrize(
    ("name", "part_of"),
    [
        ("sphere.mesh", lambda mesh: mesh.vertex()),
        ("sphere.mesh", lambda mesh: mesh.polygon(0)),
        ("texture.tex", lambda texture: texture[0]),
    ],
)
def test_parts_keep_their_owner_alive_and_accounted(aims: Any, name: str, part_of: Any) -> None:
    expected = np.asarray(part_of(keep := aims.read(sample(name)))).copy()
    del keep
    with lc.DataCache("1MiB") as cache:
        proxy = lc.load(sample(name))
        part = part_of(proxy)
        proxy.release()
        array = np.asarray(part)
        del proxy, part
        gc.collect()
        np.testing.assert_array_equal(array, expected)
        assert cache.used == OBSERVED[name]["nbytes"]
        del array
        gc.collect()
        assert cache.used == 0


def test_a_header_is_a_copy_that_depends_on_nothing(aims: Any) -> None:
    proxy = lc.load(sample("vol_S16.ima"))
    sizes = proxy.header()["volume_dimension"]
    proxy.release()
    del proxy
    gc.collect()
    assert list(sizes) == [6, 5, 4, 1]
    assert lc.load(sample("texture.tex")).header()["data_type"] == "FLOAT"


def test_vertices_of_a_graph_keep_it_alive(aims: Any, tmp_path: Path) -> None:
    with lc.DataCache("10MiB") as cache:
        proxy = lc.load(graph_file(tmp_path))
        nodes = proxy.vertices()
        proxy.release()
        del proxy
        gc.collect()
        assert sorted(node["name"] for node in nodes)[:2] == ["s1", "s10"]
        assert cache.used > 0
        del nodes
        gc.collect()
        assert cache.used == 0
