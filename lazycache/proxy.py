"""`LazyReadData`: data that are loaded when they are used, and that may be released meanwhile.

A proxy holds a node (see ``expression``) and, once that was computed, its result. The data of
files belong to a cache.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from . import _aims, execute
from . import cache as caches
from ._buffers import LARGE
from .arraylike import ArrayLike
from .cache import DataCache
from .expression import (
    Affine,
    FileNode,
    GridMode,
    Info,
    Node,
    OpNode,
    ValueNode,
    describe,
    walk,
)
from .inputs import path_of, value_node
from .layout import layout_of
from .outline import file_info
from .readers import named
from .recipe import pack, unpack
from .saving import ImageFile, check_files, save
from .sizes import nbytes_of
from .source import Result, file_key

_GRID_MODES = ("error", "warn", "ignore")


class LazyReadData(ArrayLike):
    """A stand-in for data, mostly of a file, that is loaded when something needs its values.

    ``data_or_filename`` is a path, a nibabel image that was loaded from a file (the same as its
    path), any other object, or another proxy. Arrays are copied, unless nobody can write to them.

    ``read_options`` and further keyword arguments go to the reader; ``reader`` is a reader's name,
    a function of a path, or an object with ``read(path, **options)``. ``nops`` is the number of
    operations after which the data may be dropped (0: when room is needed); they are read again
    when they are used again. ``dtype`` converts while loading. ``cache`` is the `DataCache` that
    the data are charged to; without it, the innermost one open. ``grid`` says what to do where
    operands lie on different grids: ``"error"``, ``"warn"`` or ``"ignore"``. ``filename`` names
    an object that was not read by this proxy.

    Nothing is read here, and no operator reads: operators give proxies of expressions, which are
    computed when their `data` are asked for. An error that is found then names the file and the
    line where the operator was written. Data are read-only; write ``.data.copy()`` to change them,
    or use in-place operators and item assignment, which change this proxy's data and no others.

    A subclass may override `load_data`, which then loads whenever the data are needed.
    """

    __slots__ = ("__dict__", "__weakref__", "_cache", "_claim", "_grid", "_made_in", "_node",
                 "_result")  # fmt: skip

    filename: str | None

    def __init__(
        self,
        data_or_filename: Any,
        allocator_context: Any = None,
        read_options: Mapping[str, Any] | None = None,
        nops: int = 0,
        reader: Any = None,
        *,
        cache: DataCache | None = None,
        dtype: DTypeLike | None = None,
        grid: GridMode = "error",
        **kwargs: Any,
    ) -> None:
        if grid not in _GRID_MODES:
            raise ValueError(f'grid={grid!r} is not known: write "error", "warn" or "ignore"')
        if data_or_filename is None:
            raise TypeError("None is no data: give a path, an image, an array or a proxy")
        self._cache = cache
        self._grid: GridMode = grid
        self._made_in = _scope_here()
        self._result: Result | None = None
        if isinstance(data_or_filename, LazyReadData):
            self._copy_from(data_or_filename)
            return
        self.allocator_context = allocator_context
        self.read_options = read_options
        self.reader = reader
        self.kwargs = kwargs
        self.filename = None
        path = path_of(data_or_filename)
        if path is None:
            self.filename = kwargs.pop("filename", None)
            self._stand_for(self._charged(value_node(data_or_filename, self.filename or "")))
            return
        options = {**(read_options or {}), **kwargs}
        if allocator_context is not None:
            options["allocator_context"] = allocator_context
        self.reader = reader = named(reader, path, options, dtype)
        if _overridden(type(self)):
            reader, options = _Override(type(self), self.__dict__), {}
        key = file_key(path, reader, options, dtype)
        self.filename = key.path
        self._stand_for(FileNode(key, nops, reader))

    def _stand_for(self, node: Node) -> None:
        self._node = node
        self._claim = node.claim() if isinstance(node, FileNode | OpNode) else None

    def _copy_from(self, other: LazyReadData) -> None:
        self.__dict__.update(other.__dict__)
        self._stand_for(other._node)
        self._result = other._result
        if self._cache is None:
            self._cache = other._cache
        if self._grid == "error":
            self._grid = other._grid

    # Data

    @property
    def data(self) -> Any:
        """The data: read, or computed, unless they are in memory. Arrays are read-only.

        Raises what reading and computing raise; the next access tries again.
        """
        node = self._node
        if type(node) is FileNode and node.looked:
            value = self._use().lookup(node.key)
            if value is not None:
                return value
        result = self._result
        if node is _LOADING:
            return result
        if isinstance(node, ValueNode) and node.adopted:
            return node.value
        if result is not None:
            value = result.value
            if value is not None:
                return value
        try:
            value, result = execute.compute([node], self._use())[0]
        except AttributeError as error:
            # Python would take it for a missing attribute of the proxy, and drop it.
            raise RuntimeError(f"{describe(node)}: {error}") from error
        self._keep(node, result)
        return value

    @data.setter
    def data(self, value: Any) -> None:
        if self._node is _LOADING:
            self._result = value  # inside load_data of a subclass
        else:
            self._become(value_node(value, self.filename or ""))

    def get_data(self) -> Any:
        """The data; the same as `data`."""
        return self.data

    def load_data(self) -> Any:
        """Load the data. Override this to load in another way: return them, or set ``self.data``.

        Called without a lock, once at a time for this proxy, perhaps in another thread; not to be
        called by users.
        """
        if self._node is not _LOADING:
            return self.data
        options = {**(self.read_options or {}), **self.kwargs}
        assert self.filename is not None
        self.data = file_key(self.filename, self.reader, options).load()
        return self.data

    def _lazy_read(self) -> Any:
        """Load the data and return them: `load_data`, whichever way it gives them."""
        value = self.load_data()
        return self.data if value is None else value

    def loaded(self) -> bool:
        """Whether the data are in memory."""
        if isinstance(self._node, FileNode):
            return self._use().holds(self._node.key) or _has_value(self._result)
        return isinstance(self._node, ValueNode) or execute.available(self._node)

    def preloading(self) -> bool:
        """Whether loading has started; still True once the data are in memory."""
        node = self._node
        return self.loaded() or (isinstance(node, FileNode) and self._use().loading(node.key))

    def not_started(self) -> bool:
        """Whether nothing was loaded, nor has loading started."""
        return not self.preloading()

    def release(self) -> None:
        """Drop the data from memory, if nobody is using them; they can be had again."""
        self._result = None
        if isinstance(self._node, FileNode):
            self._use().release(self._node.key)

    @contextmanager
    def pinned(self) -> Iterator[Any]:
        """A context in which the data stay in memory; gives them."""
        node = self._node
        if isinstance(node, FileNode):
            with self._use().pinned(node.key) as operation:
                [value] = operation.pin([node.key])
                yield value
        else:
            yield self.data

    @property
    def nops(self) -> int:
        """After how many operations the data of the file may go; 0: only when room is needed."""
        return self._node.handle.nops if isinstance(self._node, FileNode) else 0

    @nops.setter
    def nops(self, value: int) -> None:
        if isinstance(self._node, FileNode):
            self._node.handle.nops = self._node.handle.left = value

    # What headers tell

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the data, from headers where these tell it."""
        return self._told("shape")  # type: ignore[no-any-return]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the data, from headers where these tell it."""
        return self._told("dtype")  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        """The number of axes, from headers where these tell it."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements, from headers where these tell it."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """The bytes that the data take in memory, or would take."""
        layout = self._info().layout
        return nbytes_of(self.data) if layout is None else layout.nbytes

    @property
    def affine(self) -> Affine | None:
        """Voxel indices to millimetres (4x4), of the file or of the first operand that has one."""
        info = self._info()
        own = None if info.affine is not None or info.layout is not None else self.data
        return info.affine if own is None else getattr(own, "affine", None)

    @property
    def header(self) -> Any:
        """A copy of the header of the file, or of the first operand that has one."""
        info = self._info()
        own = None if info.header is not None or info.layout is not None else self.data
        if own is not None and _aims.kind_of(own):
            return _aims.attribute(own, "header")
        return copy.deepcopy(info.header if own is None else getattr(own, "header", None))

    def _told(self, name: str) -> Any:
        layout = self._info().layout
        return getattr(self.data if layout is None else layout, name)

    def _info(self) -> Info:
        node = self._node
        if isinstance(node, FileNode):
            if not node.looked:
                self._use().verify([node.key])
                node.looked = True
            return file_info(node.key)
        if isinstance(node, ValueNode):
            return Info(layout_of(node.value), node.affine, node.header, node.name)
        assert isinstance(node, OpNode)
        if node.info is not None and execute.available(node):
            return node.info
        return execute.prepare([node], self._use()).info[node]

    # Out

    def save(self, path: str | os.PathLike[str], dtype: DTypeLike | None = None) -> None:
        """Write the data as an image or ``.npy`` file, with the orientation of their source.

        Without ``dtype`` the type on disk is that of the data. Where the budget has no room for
        the result, it is written as it is computed, and isn't kept. Raises `WriteError`, before
        anything is computed if the path can't be written to or is one of the inputs.
        """
        node = self._node
        file = ImageFile(path, dtype)
        check_files([file], [node])
        [(_, result)] = save([node], [file], self._use())
        self._keep(node, result)

    def to_nibabel(self) -> Any:
        """A nibabel image over this proxy: it loads, and gives a copy, whenever data are asked."""
        from .nibabel_image import as_nibabel

        return as_nibabel(self, self.affine, self.header)

    # Python

    def __getattr__(self, name: str) -> Any:
        # Copying, pickling, NumPy and notebooks ask for names with underscores: they never load.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if hasattr(type(self), name):
            # Python asks here when a property raised an AttributeError, which it dropped.
            raise AttributeError(f"{name!r} of {self!r} can't be had")
        data = self.data
        return _aims.attribute(data, name) if _aims.kind_of(data) else getattr(data, name)

    def __repr__(self) -> str:
        node = self._node
        if isinstance(node, FileNode):
            state = "loaded" if self.loaded() else "not loaded"
            return f"<{type(self).__name__} {node.key.name!r}, {state}>"
        if isinstance(node, ValueNode):
            layout = layout_of(node.value)
            kind = type(node.value).__name__ if layout is None else f"{layout.dtype} {layout.shape}"
            return f"<{type(self).__name__} of {kind} in memory>"
        state = "computed" if self.loaded() else "not computed"
        return f"<{type(self).__name__} of {describe(node)}, {state}>"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<code>{escape(repr(self))}</code>"

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other._cache, other._grid, other._made_in = self._cache, self._grid, self._made_in
        other._stand_for(self._node)
        other._result = self._result
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Nodes can't change, and arrays in them neither; other objects can.
        other = memo[id(self)] = self.__copy__()
        node = self._node
        if isinstance(node, ValueNode) and not isinstance(node.value, np.ndarray):
            value = copy.deepcopy(node.value, memo)
            other._stand_for(ValueNode(value, node.name, node.affine, node.header))
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), pack(self._node), self._grid, self.__dict__.copy())

    # What the operators need

    def _derive(self, node: Node) -> Any:
        other = object.__new__(LazyReadData)
        other._cache, other._grid = self._cache, self._grid
        other._made_in = self._made_in
        other._stand_for(self._charged(node))
        other._result = None
        other.allocator_context = other.read_options = other.reader = None
        other.kwargs, other.filename = {}, self.filename
        return other

    def _become(self, node: Node) -> None:
        self._stand_for(self._charged(node))
        self._result = None

    def _keep(self, node: Node, result: Result | None) -> None:
        """``node`` was computed: its operands' values may go."""
        if result is not None and node is self._node:
            self._result = result
            self._claim = None

    def _charged(self, node: Node) -> Node:
        """``node``, whose arrays were copied when it was made: they count from now on.

        Small ones from when it is computed: to charge one costs more than to make it.
        """
        for part in (node, *node.operands):
            if isinstance(part, ValueNode) and getattr(part.value, "nbytes", 0) >= LARGE:
                execute.adopt(part, self._use())
        return node

    def _part(self, index: tuple[Any, ...]) -> Node | None:
        node = self._node
        if not isinstance(node, FileNode) or node.whole is not None or None in index:
            return None
        key = node.key
        part = file_key(key.path, node.reader, key.options, key.dtype, index)
        return FileNode(part, node.handle.nops, node.reader, node, index)

    def _has_room(self) -> bool:
        if not isinstance(self._node, OpNode) or execute.available(self._node):
            return False
        layout = self._info().layout
        return layout is None or 2 * layout.nbytes <= self._use().obtainable()

    def _is_array(self) -> bool:
        if self._info().layout is not None:
            return True
        return isinstance(self.data, np.ndarray | np.generic)

    def _use(self) -> DataCache:
        return caches.cache_for(self._cache, self._made_in)


# The node of the twin on which a subclass loads: it has no data yet but what it sets itself.
_LOADING = ValueNode(None, "data that are being loaded")


class _Override:
    """The reader of a subclass that overrides how data are loaded.

    Loads on a twin of the proxy, which shares its attributes but not its node: what the cache
    holds through this reader must not keep the proxy's own interest in the data alive.
    """

    __slots__ = ("attributes", "kind")

    def __init__(self, kind: type[LazyReadData], attributes: dict[str, Any]) -> None:
        self.kind = kind
        self.attributes = attributes

    def __call__(self, path: str, **options: Any) -> Any:
        twin = object.__new__(self.kind)
        twin.__dict__ = self.attributes
        twin._node, twin._result = _LOADING, None
        return twin._lazy_read()


def _overridden(kind: type[LazyReadData]) -> bool:
    return (
        kind.load_data is not LazyReadData.load_data
        or kind._lazy_read is not LazyReadData._lazy_read
    )


def _has_value(result: Result | None) -> bool:
    return result is not None and result.value is not None


def _scope_here() -> weakref.ref[DataCache] | None:
    scope = caches._open_scope()
    return None if scope is None else weakref.ref(scope)


def _restore(
    kind: type[LazyReadData], packed: Any, grid: GridMode, attributes: dict[str, Any]
) -> LazyReadData:
    proxy = object.__new__(kind)
    proxy._cache, proxy._grid, proxy._made_in = None, grid, _scope_here()
    proxy._result = None
    proxy.__dict__.update(attributes)
    proxy._stand_for(unpack(packed))
    for node in walk([proxy._node]):
        proxy._charged(node)
    return proxy
