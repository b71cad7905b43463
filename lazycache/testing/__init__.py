"""For the tests of those who write readers: the contract, and a reader that misbehaves."""

from __future__ import annotations

from .contract import check_reader
from .faults import FaultyReader

__all__ = ["FaultyReader", "check_reader"]
