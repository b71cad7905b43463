"""Every error and warning of lazycache.

Errors, and the built-in type that each also is (so that ``except OSError`` keeps working)::

    LazyCacheError
    ├── BudgetExceededError    MemoryError    more bytes needed than the budget can give
    ├── CacheBusyError         RuntimeError   asked for data by what had interrupted it
    ├── CacheClosedError       RuntimeError   a closed cache was asked for data
    ├── LoadCycleError         RuntimeError   a reader asks for what it is reading
    ├── ReadError              OSError        a file can't be read; names it
    │   ├── UnknownFormatError                no reader takes it
    │   ├── TruncatedFileError                it ends before its header says
    │   └── FileChangedError                  it changed while it was in use
    ├── WriteError             OSError        a result can't be written; no partial file stays
    ├── ShapeMismatchError     ValueError     operands whose shapes don't go together
    ├── GridMismatchError      ValueError     operands that don't lie on one grid
    ├── SizeError              ValueError     a size that can't be understood
    └── FormulaError           ValueError     a formula that can't be understood

Warnings::

    LazyCacheWarning           UserWarning
    ├── BudgetExceededWarning                 the budget was exceeded (counted as an overcommit)
    ├── FileChangedWarning                    a file changed between two computations
    ├── GridMismatchWarning                   grids differ and ``grid="warn"`` was asked for
    ├── IntegerWrapWarning                    integer sums may have wrapped around
    ├── PluginWarning                         a reader plug-in could not be loaded
    └── StackingWarning                       NumPy loaded a whole list of proxies

A missing file is a plain `FileNotFoundError`, a directory an `IsADirectoryError`, a file without
read permission a `PermissionError`: each with its ``filename``.
"""

from __future__ import annotations


class LazyCacheError(Exception):
    """The base of every error that lazycache defines."""


class BudgetExceededError(LazyCacheError, MemoryError):
    """More bytes are needed than the budget can give; nothing was read for the request."""


class CacheClosedError(LazyCacheError, RuntimeError):
    """A closed cache was asked for data."""


class CacheBusyError(LazyCacheError, RuntimeError):
    """Data were asked for by a finalizer or signal handler that interrupted the cache itself."""


class LoadCycleError(LazyCacheError, RuntimeError):
    """A reader asks, directly or through other threads, for the data that it is reading."""


class ReadError(LazyCacheError, OSError):
    """A file can't be read. The message names the file and says what to do."""


class UnknownFormatError(ReadError):
    """No reader takes this file: an unknown extension, or content of another kind."""


class TruncatedFileError(ReadError):
    """The file ends before the data that its header announces."""


class FileChangedError(ReadError):
    """A file changed while a computation was using it."""


class WriteError(LazyCacheError, OSError):
    """A result can't be written. Whatever stood at the path before still does."""


class ShapeMismatchError(LazyCacheError, ValueError):
    """Operands whose shapes don't go together."""


class GridMismatchError(LazyCacheError, ValueError):
    """Operands whose affines put their voxels at different places."""


class SizeError(LazyCacheError, ValueError):
    """A size or a budget that can't be understood."""


class FormulaError(LazyCacheError, ValueError):
    """A formula that can't be understood, or that asks for what formulas may not do."""


class LazyCacheWarning(UserWarning):
    """The base of every warning that lazycache defines."""


class BudgetExceededWarning(LazyCacheWarning):
    """The budget was exceeded because nothing could be freed; counted in ``overcommits``."""


class FileChangedWarning(LazyCacheWarning):
    """A file changed between two computations; its old data are no longer used."""


class GridMismatchWarning(LazyCacheWarning):
    """Operands lie on different grids, and ``grid="warn"`` was asked for."""


class IntegerWrapWarning(LazyCacheWarning):
    """A chain of integer operations may have wrapped around."""


class PluginWarning(LazyCacheWarning):
    """A reader plug-in could not be loaded and is skipped."""


class StackingWarning(LazyCacheWarning):
    """NumPy turned a list of proxies into one array, loading each whole."""
