"""What users see: the names, their documentation, and that importing them is light."""

from __future__ import annotations

import builtins
import inspect
import subprocess
import sys
import types

import pytest

import lazycache as lc

HEAVY = {"nibabel", "psutil", "tqdm", "isal", "scipy", "nilearn", "h5py", "asyncio"}


def test_all_names_what_there_is() -> None:
    public = {
        name
        for name, value in vars(lc).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - {"annotations"} == set(lc.__all__)


@pytest.mark.parametrize("name", lc.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(lc, name))


@pytest.mark.parametrize(
    "kind", [lc.DataCache, lc.LazyReadData, lc.PreloadIterator, lc.PreloadList]
)
def test_every_public_method_is_documented(kind: type) -> None:
    # Of the methods of a list, only those that a PreloadList adds something to have a text.
    own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    for name, value in own.items():
        if callable(value) or isinstance(value, property):
            assert inspect.getdoc(value) or hasattr(list, name), name


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, lazycache; print(*{name.partition('.')[0] for name in sys.modules})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(process.stdout.split())


def test_every_error_is_what_its_documentation_says() -> None:
    from lazycache import errors

    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert {kind.__name__ for kind in classes} <= set(lc.__all__)
    for kind in classes:
        assert issubclass(kind, lc.LazyCacheError | lc.LazyCacheWarning)
        line = next(text for text in str(errors.__doc__).splitlines() if kind.__name__ in text)
        for base in ("MemoryError", "RuntimeError", "OSError", "ValueError"):
            if f" {base} " in line:
                assert issubclass(kind, getattr(builtins, base))
