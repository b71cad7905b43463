"""The command, run in this process; in one of its own where signals and pipes are the matter."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

import lazycache
from lazycache._buffers import owner_of
from lazycache.cli import main
from lazycache.cli.inputs import expand_lists, read_eval, read_inputs, split_output
from lazycache.cli.terminal import UsageError
from lazycache.cli.voxels import count_not_finite

AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
SHAPE = (6, 7, 8)


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> Run:
    """Run the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Ran:
        capfd.readouterr()
        status = main([str(argument) for argument in argv])
        return Ran(status, *capfd.readouterr())

    return run


def image(path: Path | str, data: NDArray[Any], affine: Any = AFFINE) -> NDArray[Any]:
    nib.save(nib.Nifti1Image(data, affine), path)
    return data


def loaded(path: Path | str) -> NDArray[Any]:
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def volumes(tmp_path: Path) -> list[NDArray[Any]]:
    """Five int16 volumes s1.nii.gz ... s5.nii.gz."""
    random = np.random.default_rng(0)
    return [
        image(tmp_path / f"s{k}.nii.gz", random.integers(0, 100, SHAPE).astype(np.int16))
        for k in range(1, 6)
    ]


FILES = [f"s{k}.nii.gz" for k in range(1, 6)]


def cut(path: str) -> None:
    """Lose the second half of a file."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def leftovers() -> set[str]:
    return {name for name in os.listdir() if name not in FILES}


class TestArguments:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("out.nii.gz", ("out.nii.gz", None)),
            ("out.nii=mean(images)", ("out.nii", "mean(images)")),
            ("out.NII.GZ=I1 == 2", ("out.NII.GZ", "I1 == 2")),
            ("ses=1/run=2.nii.gz", ("ses=1/run=2.nii.gz", None)),
            (
                "ses=1/run=2.nii.gz=std(images, ddof=1)",
                ("ses=1/run=2.nii.gz", "std(images, ddof=1)"),
            ),
            ("a.nii.d/b.npy=I1", ("a.nii.d/b.npy", "I1")),
            ("out.txt=I1 == 2", ("out.txt", "I1 == 2")),
            ("=np.mean(I1)", ("", "np.mean(I1)")),
            ("-=np.mean(I1)", ("-", "np.mean(I1)")),
            ("-", ("-", None)),
            ("out.nii=", ("out.nii", "")),
        ],
    )
    def test_an_output_ends_at_the_equals_after_its_extension(
        self, text: str, expected: tuple[str, str | None]
    ) -> None:
        assert split_output(text) == expected

    def test_the_formula_stands_before_the_images_or_after_each_output(self) -> None:
        inputs, [first, second] = read_eval(["a.nii", "m=b.nii"], ["o.nii=I1", "p.nii=m"])
        assert (inputs.images, inputs.names) == (["a.nii"], {"m": "b.nii"})
        assert (first.path, first.formula, second.path) == ("o.nii", "I1", "p.nii")
        inputs, [only] = read_eval(["I1 + m", "a.nii", "m=b.nii"], ["o.nii"])
        assert (inputs.paths(), only.path, only.formula) == (["a.nii", "b.nii"], "o.nii", "I1 + m")
        _, [number] = read_eval(["np.mean(I1)", "a.nii"], [])
        assert number.path is None

    @pytest.mark.parametrize(
        ("given", "outputs", "says"),
        [
            ([], [], "write a formula"),
            ([], ["o.nii"], "write a formula"),
            (["a.nii"], ["o.nii", "p.nii=I1"], "-o o.nii=FORMULA"),
            (["I1", "a.nii"], ["o.nii", "p.nii"], "-o OUT=FORMULA"),
            (["@list.txt"], ["o.nii"], "write the formula before"),
            (["I1", "mean=a.nii"], ["o.nii"], "already has a meaning"),
            (["I1", "a=a.nii", "a=b.nii"], ["o.nii"], "already a.nii"),
            (["I1", "a="], ["o.nii"], "no file is given"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(
        self, given: list[str], outputs: list[str], says: str
    ) -> None:
        with pytest.raises(UsageError, match=says):
            read_eval(given, outputs)

    def test_a_file_in_place_of_the_formula_is_told(self, run: Run, volumes: Any) -> None:
        ran = run("eval", *FILES, "-o", "out.nii")
        assert ran.status == 2
        assert "s1.nii.gz is a file: write the formula before the images" in ran.err

    def test_a_file_whose_name_holds_an_equals_is_an_image(
        self, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("ses=1.nii").touch()
        assert read_inputs(["ses=1.nii", "ses=2.nii"]).images == ["ses=1.nii"]
        assert read_inputs(["./ses=2.nii"]).images == ["./ses=2.nii"]

    def test_a_list_names_files_relative_to_its_own_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "lists"
        folder.mkdir()
        (folder / "all.txt").write_text("# ours\n\n  a b.nii \n/abs/c.nii\n../d.nii\n")
        found = expand_lists(["x.nii", f"@{folder}/all.txt", "y.nii"])
        inside = [f"{folder}/a b.nii", "/abs/c.nii", f"{folder}/../d.nii"]
        assert found == ["x.nii", *inside, "y.nii"]

    @pytest.mark.parametrize(
        ("content", "says"), [(b"# nothing\n\n", "names no files"), (b"\x1f\x8b\xff", "no list")]
    )
    def test_a_list_that_is_none_is_refused(
        self, tmp_path: Path, content: bytes, says: str
    ) -> None:
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(UsageError, match=says):
            expand_lists([f"@{tmp_path}/list"])

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            ([], "no command is given"),
            (["evil"], "invalid choice: 'evil'"),
            (["info"], "IMAGE"),
            (["check", "--strange", "a.nii"], "--strange"),
            (["eval", "I1", "a.nii", "--threads", "all"], "'all' is not a whole number from 0 up"),
            (["eval", "-f", "I1", "a.nii", "-o", "o.nii=I1"], "a formula is given with -f"),
            (["eval", "I1", "a.nii", "--grid", "maybe"], "maybe"),
        ],
    )
    def test_a_command_that_is_none_is_one_line_and_status_2(
        self, run: Run, argv: list[str], says: str
    ) -> None:
        ran = run(*argv)
        assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert ran.err.startswith("lazycache: error: ")
        assert says in ran.err

    @pytest.mark.parametrize(
        "argv", [["--help"], ["--version"], ["eval", "--help"], ["explain", "--help"]]
    )
    def test_help_and_version_are_results(self, run: Run, argv: list[str]) -> None:
        ran = run(*argv)
        assert (ran.status, ran.err) == (0, "")
        assert "lazycache" in ran.out


class TestInfo:
    def test_it_prints_what_the_header_tells(self, run: Run, volumes: Any) -> None:
        ran = run("info", "s1.nii.gz")
        assert (ran.status, ran.err) == (0, "")
        for text in (
            "s1.nii.gz",
            "NIfTI-1",
            "6 x 7 x 8",
            "int16",
            "672 B",
            "2 x 2 x 2.5 mm",
            "RAS",
        ):
            assert text in ran.out

    def test_it_says_why_the_type_is_not_the_one_on_disk(self, run: Run) -> None:
        scaled = nib.Nifti1Image(np.linspace(0, 1, 336).reshape(SHAPE), AFFINE)
        scaled.set_data_dtype(np.int16)
        nib.save(scaled, "scaled.nii")
        assert "float64 (" in run("info", "scaled.nii").out

    def test_json_holds_the_same_for_programs(self, run: Run, volumes: Any) -> None:
        np.save("a.npy", np.zeros((2, 3)))
        one, two = json.loads(run("info", "--json", "s1.nii.gz", "a.npy").out)
        assert one["shape"] == [6, 7, 8]
        assert (one["dtype"], one["nbytes"], one["orientation"]) == ("int16", 672, "RAS")
        assert one["voxel_sizes"] == [2.0, 2.0, 2.5]
        assert one["affine"] == AFFINE.tolist()
        assert one["files"] == [os.path.abspath("s1.nii.gz")]
        assert (two["affine"], two["orientation"], two["path"]) == (None, None, "a.npy")

    def test_a_bad_file_does_not_hide_the_others(self, run: Run, volumes: Any) -> None:
        Path("text.nii").write_text("hello")
        ran = run("info", "none.nii", "s1.nii.gz", "text.nii", "--json")
        assert ran.status == 1
        assert [one["path"] for one in json.loads(ran.out)] == ["s1.nii.gz"]
        first, second = ran.err.splitlines()
        assert "none.nii: no such file" in first
        assert "text.nii" in second

    def test_a_list_stands_for_its_files(self, run: Run, volumes: Any) -> None:
        Path("list.txt").write_text("\n".join(FILES))
        assert len(json.loads(run("info", "--json", "@list.txt").out)) == 5
        missing = run("info", "@none.txt")
        assert (missing.status, "none.txt: no such file" in missing.err) == (1, True)


class TestCheck:
    def test_images_that_go_together_are_status_0(self, run: Run, volumes: Any) -> None:
        assert run("check", *FILES) == (0, "5 images: no problem found\n", "")

    def test_the_odd_ones_are_listed(self, run: Run, volumes: Any) -> None:
        values = np.ones((6, 7, 9), np.float32)
        values[0, 0, :3] = np.nan
        values[1, 1, 1] = -np.inf
        image("odd.nii", values)
        image("shifted.nii", np.ones(SHAPE, np.int16), AFFINE + np.eye(4, k=3))
        image("rounded.nii", np.ones(SHAPE, np.int16), AFFINE + 1e-4 * np.eye(4, k=3))
        image("flipped.nii", np.ones(SHAPE, np.int16), np.diag([-2, 2, 2.5, 1]))
        ran = run("check", *FILES, "odd.nii", "shifted.nii", "rounded.nii", "flipped.nii")
        assert ran.status == 1
        assert "6 x 7 x 9: 1 image: odd.nii\n" in ran.out
        assert "6 x 7 x 8: 8 images\n" in ran.out
        assert "float32: 1 image: odd.nii\n" in ran.out
        assert "RAS, 1 mm away: 1 image: shifted.nii\n" in ran.out
        assert "LAS, 22 mm away: 1 image: flipped.nii\n" in ran.out
        assert "odd.nii: 3 NaN and 1 infinite of 378 values\n" in ran.out
        assert "rounded" not in ran.out

    def test_every_file_is_really_read(self, run: Run, volumes: Any) -> None:
        cut("s3.nii.gz")
        Path("empty.nii").touch()
        Path("text.nii").write_text("hello")
        os.mkdir("folder.nii")
        ran = run("check", *FILES, "empty.nii", "text.nii", "folder.nii", "none.nii")
        assert ran.status == 1
        title, *lines = ran.out.splitlines()
        assert title == "unreadable:"
        for name, line in zip(("s3.nii.gz", "empty", "text", "folder", "none"), lines, strict=True):
            assert name in line

    def test_one_file_at_a_time_is_held(self, run: Run, volumes: Any, monkeypatch: Any) -> None:
        seen: list[weakref.ref[Any]] = []

        def count(value: Any) -> Any:
            assert all(owner() is None for owner in seen)
            seen.append(weakref.ref(owner_of(value)))
            return count_not_finite(value)

        monkeypatch.setattr("lazycache.cli.inspecting.count_not_finite", count)
        assert run("check", *FILES) == (0, "5 images: no problem found\n", "")
        assert len(seen) == 5

    def test_it_keeps_to_the_budget_and_names_files_when_asked(
        self, run: Run, volumes: Any
    ) -> None:
        # Room for one, with what reading it takes; going over the budget would be told.
        assert run("check", *FILES, "--budget", "1200kB").err == ""
        assert run("check", *FILES, "-v").err.count("lazycache: load ") == 5

    def test_a_bad_budget_is_told_before_anything_is_read(self, run: Run) -> None:
        ran = run("check", "none.nii", "--budget", "4 bananas")
        assert ran.status == 2
        assert "4 bananas" in ran.err


class TestEval:
    def test_results_are_those_of_numpy_in_float32_on_the_grid_of_the_images(
        self, run: Run, volumes: list[NDArray[Any]]
    ) -> None:
        ran = run("eval", *FILES, "-o", "m.nii.gz=mean(images)", "-o", "s.nii=std(images, ddof=1)")
        assert (ran.status, ran.out) == (0, "")
        for name, expected in (
            ("m.nii.gz", np.mean(volumes, axis=0)),
            ("s.nii", np.std(volumes, axis=0, ddof=1)),
        ):
            np.testing.assert_array_equal(loaded(name), expected.astype(np.float32))
            assert loaded(name).dtype == np.float32
            np.testing.assert_array_equal(nib.load(name).affine, AFFINE)
        assert leftovers() == {"m.nii.gz", "s.nii"}

    def test_the_formula_may_stand_first(self, run: Run, volumes: list[NDArray[Any]]) -> None:
        first, second, third = volumes[:3]
        ran = run("eval", "(I1 * 2 + I2 * I3) / 1.2", *FILES[:3], "-o", "out.nii")
        assert ran.status == 0
        expected = ((first * 2 + second * third) / 1.2).astype(np.float32)
        np.testing.assert_array_equal(loaded("out.nii"), expected)

    @pytest.mark.parametrize(
        ("formula", "options", "dtype"),
        [
            ("I1 // 2", [], "int16"),
            ("I1 > 3", [], "uint8"),
            ("I1 / 2", ["--dtype", "float64"], "float64"),
            ("I1 / 2", ["--dtype", "uint8"], "uint8"),
            ("I1.astype('float64')", [], "float32"),
        ],
    )
    def test_the_type_on_disk(
        self, run: Run, volumes: Any, formula: str, options: list[str], dtype: str
    ) -> None:
        assert run("eval", formula, "s1.nii.gz", "-o", "out.nii", *options).status == 0
        assert loaded("out.nii").dtype == dtype

    def test_named_inputs_lists_and_counting_from_zero(
        self, run: Run, volumes: list[NDArray[Any]]
    ) -> None:
        Path("list.txt").write_text("s1.nii.gz\ns2.nii.gz\n")
        formula = "where(mask > 50, I1 - I0, 0)"
        argv = ["eval", formula, "--zero", "@list.txt", "mask=s3.nii.gz", "-o", "o.npy"]
        assert run(*argv).status == 0
        first, second, mask = volumes[:3]
        np.testing.assert_array_equal(np.load("o.npy"), np.where(mask > 50, second - first, 0))

    @pytest.mark.parametrize(
        "argv",
        [
            ["-i", "s1.nii.gz", "-i", "s2.nii.gz", "-o", "o.npy", "-f", "I1 * 2 - image[2]"],
            ["-o", "o.npy", "-f", "I1 * 2 - I2", "s1.nii.gz", "s2.nii.gz", "-l", "-t", "4"],
            ["-o", "o.npy", "I1 * 2 - I2", "s1.nii.gz", "s2.nii.gz", "-t", "0"],
            ["-z", "s2.nii.gz", "-i", "s1.nii.gz", "-f", "image[0] * 2 - I1", "-o", "o.npy"],
            ["-f", "-I2 + I1*2", "--input=s1.nii.gz", "--input=s2.nii.gz", "--output=o.npy"],
        ],
    )
    def test_a_command_line_of_carto_linear_comb_works(
        self, run: Run, volumes: list[NDArray[Any]], argv: list[str]
    ) -> None:
        ran = run("eval", *argv)
        assert (ran.status, ran.out) == (0, "")
        np.testing.assert_array_equal(np.load("o.npy"), volumes[0] * 2 - volumes[1])

    def test_options_may_stand_anywhere(self, run: Run, volumes: Any) -> None:
        argv = ["-q", "I1 + I2", "s1.nii.gz", "-o", "out.nii", "--dtype", "int32", "s2.nii.gz"]
        assert run("eval", *argv).status == 0
        assert loaded("out.nii").dtype == np.int32

    def test_numbers_are_printed_and_nothing_else_is(
        self, run: Run, volumes: list[NDArray[Any]]
    ) -> None:
        ran = run("eval", "np.mean(I1)", "s1.nii.gz")
        assert (ran.status, float(ran.out)) == (0, volumes[0].mean())
        ran = run("eval", "s1.nii.gz", "-o", "=I1.max()", "-o", "o.nii=-I1", "-o", "=len(images)")
        assert (ran.status, ran.out) == (0, f"{volumes[0].max()}\n1\n")
        np.testing.assert_array_equal(loaded("o.nii"), -volumes[0])
        assert run("eval", "1 + 1", "-o", "-").out == "2\n"

    def test_a_number_is_no_image_and_an_image_is_no_number(self, run: Run, volumes: Any) -> None:
        cut("s1.nii.gz")  # found out without reading voxels, or this would be what is told
        for formula in ("mean(I1)", "np.mean(I1)", "len(images)"):
            ran = run("eval", formula, "s1.nii.gz", "-o", "out.nii")
            assert ran.status == 2
            assert f"out.nii: the result of {formula} is a number" in ran.err
        ran = run("eval", "I1 + 1", "s1.nii.gz")
        assert ran.status == 2
        assert "I1 + 1 is an image of shape (6, 7, 8)" in ran.err
        assert leftovers() == set()

    def test_the_closing_line_tells_what_was_done(self, run: Run, volumes: Any) -> None:
        values = np.ones(SHAPE, np.float32)
        values[0, :2, 0] = np.nan
        image("nan.nii", values)
        files = [*FILES, "nan.nii"]
        argv = ["eval", *files, "-o", "m.nii=mean(images)", "-o", "n.nii=nanmean(images)"]
        line = run(*argv, "--budget", "8MiB").err
        assert "6 files read (4.59 KiB), peak " in line
        assert " of 8 MiB, " in line
        assert line.endswith(" s, NaN voxels: 2 in m.nii\n")
        assert run("eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii", "-q").err == ""
        assert "NaN voxels: none" in run("eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii").err

    def test_parts_of_a_file_count_as_that_file(self, run: Run, volumes: Any) -> None:
        ran = run("eval", "I1[..., 0] + I1[..., 1]", "s1.nii.gz", "-o", "o.nii")
        assert "2 reads of 1 file (" in ran.err

    def test_verbose_tells_each_file(self, run: Run, volumes: Any) -> None:
        ran = run("eval", "I1 + I2", *FILES[:2], "-o", "o.nii", "-v")
        assert f"load {os.path.abspath('s1.nii.gz')} (672 B)" in ran.err

    def test_the_bar_counts_files_on_a_terminal_only(
        self, run: Run, volumes: Any, monkeypatch: Any
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        assert (
            "file" not in run("eval", "I1 + I2", *FILES[:2], "-o", "o.nii").err.split(" read ")[1]
        )
        for argv in (["eval", *FILES, "-o", "o.nii=mean(images)"], ["check", *FILES]):
            monkeypatch.setattr(sys, "stderr", Terminal())
            assert run(*argv).status == 0
            assert "0/5" in sys.stderr.getvalue()  # type: ignore[attr-defined]
            monkeypatch.setattr(sys, "stderr", Terminal())
            assert run(*argv, "-q").status == 0
            assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]

    def test_grids_are_compared_unless_one_says_otherwise(self, run: Run, volumes: Any) -> None:
        image("flipped.nii", np.ones(SHAPE, np.float32), np.diag([-2, 2, 2.5, 1]))
        argv = ["eval", "I1 + I2", "s1.nii.gz", "flipped.nii", "-o", "o.nii"]
        ran = run(*argv)
        assert (ran.status, ran.err.count("\n"), leftovers()) == (1, 1, {"flipped.nii"})
        assert "LAS" in ran.err
        warned = run(*argv, "--grid", "warn")
        assert (warned.status, "warning: images lie on different grids" in warned.err) == (0, True)
        ignored = run(*argv, "--grid", "ignore")
        assert (ignored.status, "warning" in ignored.err) == (0, False)

    def test_warnings_are_one_line_each(self, run: Run) -> None:
        for name in ("a.nii", "b.nii"):
            image(name, np.full(SHAPE, 30_000, np.int16))
        ran = run("eval", "I1 + I2", "a.nii", "b.nii", "-o", "o.nii", "-q")
        assert ran.status == 0
        assert ran.err.startswith("lazycache: warning: ")
        assert ran.err.count("\n") == 1
        assert "wrap" in ran.err
        assert "line" not in ran.err

    def test_going_over_the_budget_is_told_once(self, run: Run, volumes: Any) -> None:
        ran = run("eval", *FILES, "-o", "o.nii=mean(images)", "--budget", "1kB")
        warning, closing = ran.err.splitlines()
        assert (ran.status, "more than the budget" in warning) == (0, True)
        assert " of 1000 B, " in closing

    def test_the_number_of_threads_is_given_back(
        self, run: Run, volumes: Any, monkeypatch: Any
    ) -> None:
        for before in (None, "5"):
            if before is not None:
                monkeypatch.setenv("LAZYCACHE_THREADS", before)
            argv = ["eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii", "--threads", "3"]
            assert run(*argv).status == 0
            assert os.environ.get("LAZYCACHE_THREADS") == before


class TestExplain:
    MAPS = (*FILES, "-o", "m.nii.gz=mean(images)", "-o", "s.nii=std(images, ddof=1)")

    def test_the_plan_is_printed_and_nothing_is_read_or_written(
        self, run: Run, volumes: Any
    ) -> None:
        for name in FILES:
            cut(name)
        for argv in (("explain", *self.MAPS), ("eval", "--dry-run", *self.MAPS)):
            ran = run(*argv, "--budget", "8MiB")
            assert (ran.status, ran.err) == (0, "")
            assert "files   5 files, each read once: 3.28 KiB of data\n" in ran.out
            assert "budget  8 MiB: fits; the smallest budget that works is " in ran.out
            assert leftovers() == set()

    def test_it_tells_what_eval_then_does(self, run: Run) -> None:
        random = np.random.default_rng(0)
        files = [f"v{k}.nii" for k in range(8)]
        for name in files:
            image(name, random.integers(0, 100, (60, 60, 50)).astype(np.int16))
        maps = (*files, "-o", "m.nii=mean(images)", "-o", "s.nii=std(images)")
        refused = run("explain", *maps, "--budget", "10kB")
        least = re.search(r"--budget, (.*) or more$", refused.err.strip())
        assert least is not None
        for budget in ("64MiB", least[1]):
            plan = run("explain", *maps, "--budget", budget)
            line = run("eval", *maps, "--budget", budget).err
            assert plan.status == 0
            again = re.search(r"8 files, (\d+) reads", plan.out)
            assert (again is None) is (budget == "64MiB")
            assert again is not None or "8 files, each read once" in plan.out
            assert ("8 files read" if again is None else f"{again[1]} reads of 8 files") in line
            peak = re.search(r"^peak +(.*) of memory$", plan.out, re.MULTILINE)
            assert peak is not None
            assert f"peak {peak[1]} of " in line

    def test_a_budget_that_is_too_small_is_status_1_and_the_one_that_it_names_works(
        self, run: Run, volumes: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("LAZYCACHE_STRICT", "1")
        assert run("eval", *self.MAPS, "--budget", "10kB").status == 1
        ran = run("explain", *self.MAPS, "--budget", "10kB")
        assert ran.status == 1
        assert "budget  9.77 KiB: does not fit; the smallest budget that works is " in ran.out
        assert ran.err.startswith("lazycache: error: the budget of 9.77 KiB is too small: ")
        enough = re.search(r"--budget, (.*) or more$", ran.err.strip())
        assert enough is not None
        assert leftovers() == set()
        assert run("explain", *self.MAPS, "--budget", enough[1])[::2] == (0, "")
        assert run("eval", *self.MAPS, "--budget", enough[1]).status == 0

    def test_what_goes_to_a_file_need_not_fit(self, run: Run) -> None:
        image("run.nii", np.ones((40, 40, 30, 60), np.int16))
        formula = "(I1 - I1.mean(axis=-1, keepdims=True)) / 2"
        argv = ["explain", formula, "run.nii", "--budget", "8MiB"]  # the result takes 22 MiB
        assert run(*argv, "-o", "z.nii").status == 0

    def test_numbers_are_planned_too(self, run: Run, volumes: Any) -> None:
        ran = run("explain", "np.mean(I1)", "s1.nii.gz")
        assert (ran.status, ran.err) == (0, "")
        assert "files   1 file, read once: 672 B of data\n" in ran.out
        assert "files   nothing is read\n" in run("explain", "1 + 1").out

    def test_it_says_why_a_type_is_not_the_one_on_disk(self, run: Run) -> None:
        scaled = nib.Nifti1Image(np.linspace(0, 1, 336).reshape(SHAPE), AFFINE)
        scaled.set_data_dtype(np.int16)
        nib.save(scaled, "scaled.nii")
        ran = run("explain", "I1 + 1", "scaled.nii", "-o", "o.nii")
        assert "type    float64 for scaled.nii: int16 on disk, scaled by scl_slope" in ran.out

    @pytest.mark.parametrize(
        ("argv", "status", "says"),
        [
            (["I1", "s1.nii.gz", "-o", "s1.nii.gz"], 2, "is an input"),
            (["I1 + I2", "s1.nii.gz", "-o", "o.nii"], 2, "only one image"),
            (["I1", "s1.nii.gz"], 2, "say with -o where"),
            (["I1", "s1.nii.gz", "-o", "none/o.nii"], 2, "no folder none"),
            (["I1", "none.nii", "-o", "o.nii"], 1, "none.nii: no such file"),
            (["I1", "s1.nii.gz", "-o", "o.nii", "--budget", "4G"], 2, "4G"),
            (["--dry-run", "I1", "s1.nii.gz", "-o", "o.nii"], 2, "--dry-run"),
        ],
    )
    def test_what_is_wrong_is_told_as_eval_tells_it(
        self, run: Run, volumes: Any, argv: list[str], status: int, says: str
    ) -> None:
        ran = run("explain", *argv)
        assert (ran.status, ran.out, leftovers()) == (status, "", set())
        assert says in ran.err


class TestNothingIsReadWhenTheCommandIsWrong:
    """Status 2 although an input is missing: that would be found first if anything were read."""

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["I1 + I7", "none.nii", "-o", "o.nii"], "I7: there is only one image"),
            (["I1 +", "none.nii", "-o", "o.nii"], "ends too early"),
            (["none.nii", "-o", "o.nii=I1", "-o", "p.nii=I1 + x"], "'x' is not known"),
            (["none.nii", "-o", "o.nii=I1", "-o", "p.txt=I1"], "p.txt: can't write"),
            (["none.nii", "-o", "o.nii=I1", "-o", "none/p.nii=I1"], "no folder none"),
            (["none.nii", "-o", "o.nii=I1", "-o", "./o.nii=I1"], "the file of two outputs"),
            (["none.nii", "-o", "o.img=I1", "-o", "o.hdr=I1"], "the file of two outputs"),
            (["I1", "none.nii", "-o", "none.nii"], "none.nii is an input"),
            (["a + I1", "none.nii", "a=here.nii", "-o", "link.nii"], "is an input"),
            (["I1", "none.nii", "-o", "folder.nii"], "is a directory"),
            (["I1", "none.nii", "-o", "o.nii", "--dtype", "flaot"], "'flaot' is no type"),
            (["I1", "none.nii", "-o", "o.nii", "--dtype", "object"], "no type of numbers"),
            (["I1", "none.nii", "-o", "o.nii", "--dtype", "float16"], "can't hold float16"),
            (["I1", "none.nii", "-o", "o.mgz", "--dtype", "float64"], "can't hold float64"),
            *(
                (["I1", "none.nii", "-o", "o.nii", f"--budget={budget}"], f"{budget!r}")
                for budget in ("4 bananas", "-1GiB", "0.8x", "", "4G", "150%")
            ),
        ],
    )
    def test_it_is_told_first(self, run: Run, argv: list[str], says: str) -> None:
        Path("here.nii").touch()
        os.symlink("here.nii", "link.nii")
        os.mkdir("folder.nii")
        ran = run("eval", *argv)
        assert (ran.status, ran.out) == (2, "")
        assert says in ran.err
        assert leftovers() == {"here.nii", "link.nii", "folder.nii"}

    def test_a_wrong_formula_is_pointed_at(self, run: Run, volumes: Any) -> None:
        ran = run("eval", "I1 + I9", *FILES, "-o", "o.nii")
        assert ran.err.splitlines()[1:] == ["  I1 + I9", "       ^^"]

    def test_a_bad_budget_in_the_environment_is_told_too(
        self, run: Run, volumes: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("LAZYCACHE_BUDGET", "4 bananas")
        ran = run("eval", "I1", "s1.nii.gz", "-o", "o.nii")
        assert (ran.status, "4 bananas" in ran.err) == (2, True)


class TestBadInput:
    """Status 1, one line that names the file, no output."""

    @pytest.mark.parametrize("make", ["missing", "folder", "empty", "text", "cut", "unknown"])
    def test_a_file_that_cannot_be_read(self, run: Run, volumes: Any, make: str) -> None:
        name = {"cut": "s2.nii.gz", "unknown": "bad.xyz"}.get(make, "bad.nii")
        if make == "folder":
            os.mkdir(name)
        elif make == "empty":
            Path(name).touch()
        elif make in ("text", "unknown"):
            Path(name).write_text("hello")
        elif make == "cut":
            cut(name)
        before = set(os.listdir())
        ran = run("eval", "I1 + I2", "s1.nii.gz", name, "-o", "o.nii")
        assert (ran.status, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert ran.err.startswith("lazycache: error: ")
        assert name in ran.err
        assert set(os.listdir()) == before

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_without_read_permission(self, run: Run, volumes: Any) -> None:
        os.chmod("s1.nii.gz", 0)
        ran = run("eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii")
        assert (ran.status, "s1.nii.gz: permission denied" in ran.err) == (1, True)

    def test_all_missing_files_come_in_one_error(self, run: Run, volumes: Any) -> None:
        ran = run("eval", "sum(images)", "s1.nii.gz", "x.nii", "y.nii", "-o", "o.nii")
        assert (ran.status, ran.err.count("\n")) == (1, 1)
        assert "x.nii" in ran.err
        assert "y.nii" in ran.err

    def test_shapes_that_do_not_go_together(self, run: Run, volumes: Any) -> None:
        image("long.nii", np.ones((6, 7, 9), np.int16))
        ran = run("eval", "I1 + I2", "s1.nii.gz", "long.nii", "-o", "o.nii")
        assert (ran.status, ran.err.count("\n")) == (1, 1)
        for text in ("s1.nii.gz", "(6, 7, 8)", "long.nii", "(6, 7, 9)"):
            assert text in ran.err

    def test_values_that_the_type_cannot_hold_leave_no_file(self, run: Run, volumes: Any) -> None:
        ran = run("eval", "I1 - 1000", "s1.nii.gz", "-o", "o.nii", "--dtype", "uint8")
        assert (ran.status, leftovers()) == (1, set())
        assert "o.nii: 336 of 336 values" in ran.err

    def test_a_surface_is_no_image(self, run: Run) -> None:
        points = nib.gifti.GiftiDataArray(np.zeros((3, 3), np.float32))
        nib.save(nib.gifti.GiftiImage(darrays=[points]), "mesh.gii")
        ran = run("eval", "I1", "mesh.gii", "-o", "o.nii")
        assert (ran.status, leftovers()) == (1, {"mesh.gii"})
        assert "o.nii: the result is no array" in ran.err.splitlines()[-1]

    def test_an_error_that_nobody_foresaw_is_one_line_too(
        self, run: Run, volumes: Any, monkeypatch: Any
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise KeyError("strange")

        monkeypatch.setattr("lazycache.execute.compute", fail)
        argv = ["eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii"]
        assert run(*argv) == (1, "", "lazycache: error: KeyError: 'strange'\n")
        assert "Traceback" in run(*argv, "-vv").err


SLOW = """
import os, sys, threading
from lazycache.cli import main
from lazycache.readers import register_reader
from lazycache.readers.volumes import NibabelReader

class Slow(NibabelReader):
    name = "slow"
    read_part = None
    def read(self, path, **options):
        os.write(1, b"reading\\n")  # at once, whichever thread reads
        threading.Event().wait(60)

register_reader(Slow())
sys.exit(main())
"""

PLAIN = "import sys; from lazycache.cli import main; sys.exit(main())"


def start(code: str, *argv: str) -> subprocess.Popen[str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(lazycache.__file__)))
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


class TestProcess:
    @pytest.mark.parametrize("command", ["eval", "check"])
    def test_ctrl_c_leaves_nothing_behind(
        self, volumes: Any, tmp_path: Path, monkeypatch: Any, command: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        output = ["-o", "o.nii=mean(images)"] if command == "eval" else []
        process = start(SLOW, command, *FILES, *output)
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, "lazycache: interrupted\n")
        assert leftovers() == set()

    def test_a_reader_of_our_output_may_leave(
        self, volumes: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "list.txt").write_text("s1.nii.gz\n" * 2000)
        process = start(PLAIN, "info", "@list.txt")
        assert process.stdout is not None
        assert process.stdout.readline() == "s1.nii.gz\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(30) == 1

    def test_results_alone_go_to_stdout(
        self, volumes: list[NDArray[Any]], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        out, err = start(PLAIN, "eval", "I1.max()", "s1.nii.gz").communicate(timeout=60)
        assert (out, err.count("\n")) == (f"{volumes[0].max()}\n", 1)


@pytest.mark.parametrize("name", ["LAZYCACHE_THREADS", "LAZYCACHE_STRICT", "LAZYCACHE_BUDGET"])
def test_a_bad_value_in_the_environment_is_told(
    run: Run, volumes: Any, monkeypatch: Any, name: str
) -> None:
    monkeypatch.setenv(name, "maybe")
    status, out, err = run("eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii")
    assert (status, out) == (2, "")
    assert "maybe" in err
    assert not Path("o.nii").exists()


def test_a_strict_environment_makes_the_command_strict(
    run: Run, volumes: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("LAZYCACHE_STRICT", "1")
    status, _, err = run("eval", "I1 + 1", "s1.nii.gz", "-o", "o.nii", "--budget", "1kB")
    assert status == 1
    assert err.startswith("lazycache: error: ")
    assert not Path("o.nii").exists()


@pytest.mark.parametrize("formula", ["-I1", "-(I1 + 1)", "--I1", "-image[1]"])
def test_a_formula_may_begin_with_a_minus(
    run: Run, volumes: list[NDArray[Any]], formula: str
) -> None:
    assert run("eval", formula, "s1.nii.gz", "-o", "o.nii", "-q").status == 0
