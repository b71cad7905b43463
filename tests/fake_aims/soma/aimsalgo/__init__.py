"""A stand-in for the resamplers of aimsalgo, as far as ``resample.json`` records them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from soma.aims._limits import NotRecordedError
from soma.aims._objects import AffineTransformation3d
from soma.aims._volumes import VolumeBase


class ResamplerFactory:
    """Makes resamplers for volumes of the type of ``volume``."""

    def __init__(self, volume: VolumeBase) -> None:
        if volume.code not in ("FLOAT", "S16"):
            raise NotRecordedError(f"resampling {volume.code}")
        self._kind = type(volume)

    def getResampler(self, order: int) -> _Resampler:  # noqa: N802 - the name in AIMS
        if order not in (0, 1, 3):
            raise NotRecordedError(f"resampling with order {order}")
        return _Resampler(self._kind, order)


class _Resampler:
    def __init__(self, kind: type[VolumeBase], order: int) -> None:
        self._kind, self._order = kind, order

    def setDefaultValue(self, value: Any) -> None:  # noqa: N802 - the name in AIMS
        self._checked(value)

    def _checked(self, value: Any) -> None:
        wanted = float if self._kind.code == "FLOAT" else int
        if not isinstance(value, wanted | int):
            raise TypeError(f"{value!r} is no {wanted.__name__}")

    def resample(
        self,
        volume: VolumeBase,
        transform: AffineTransformation3d,
        background: Any,
        result: VolumeBase,
        verbose: bool = False,
    ) -> None:
        """Fill ``result``. A voxel is outside where its nearest one in ``volume`` doesn't exist."""
        if type(volume) is not self._kind or type(result) is not self._kind:
            raise TypeError("volumes of two types")
        if not isinstance(transform, AffineTransformation3d):
            raise TypeError(f"{type(transform).__name__} is no transformation")
        self._checked(background)
        _tell_progress()
        from scipy.ndimage import map_coordinates

        given, steps = (
            np.diag([*list(one.header()["voxel_size"])[:3], 1.0]) for one in (volume, result)
        )
        # In single precision, as there.
        back = np.float32(np.linalg.inv(transform.toMatrix() @ given))
        x, y, z = result.shape[:3]
        places = np.indices((x, y, z), np.float32).reshape(3, -1)
        places *= np.float32(np.diag(steps)[:3, None])
        places = back[:3, :3] @ places + back[:3, 3:]
        nearest = np.trunc(places + np.copysign(np.float32(0.5), places)).astype(int)
        ends = np.array(volume.shape[:3])[:, None]
        inside = ((nearest >= 0) & (nearest < ends)).all(axis=0)
        nearest = np.clip(nearest, 0, ends - 1)
        for time in range(min(volume.shape[3], result.shape[3])):
            values = volume._memory[..., time]
            if self._order:
                found = map_coordinates(values.astype(float), places, None, self._order, "mirror")
                if self._kind.code != "FLOAT":
                    found = np.rint(found)
            else:
                found = values[tuple(nearest)]
            found = np.where(inside, found, background)
            result._memory[..., time] = found.reshape(x, y, z)


def _tell_progress() -> None:
    """Written to the stream of C++, whatever ``verbose`` says."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return
    _STREAMS.append(ctypes.create_string_buffer(8))
    for name, kinds, arguments in (
        ("_ZNSt8ios_base4InitC1Ev", [ctypes.c_void_p], [ctypes.addressof(_STREAMS[-1])]),
        (
            "_ZStlsISt11char_traitsIcEERSt13basic_ostreamIcT_ES5_PKc",
            [ctypes.c_void_p, ctypes.c_char_p],
            [ctypes.addressof(ctypes.c_char.in_dll(library, "_ZSt4cout")), b"100 %"],
        ),
        (
            "_ZNSo5flushEv",
            [ctypes.c_void_p],
            [ctypes.addressof(ctypes.c_char.in_dll(library, "_ZSt4cout"))],
        ),
    ):
        function = library[name]
        function.argtypes, function.restype = kinds, ctypes.c_void_p
        function(*arguments)


_STREAMS: list[Any] = []
