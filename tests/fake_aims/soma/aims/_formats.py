"""The files: what each header says, and what is read and written.

Every format gives ``header(path)``, the fields that the Finder tells or None for a file of another
kind, and ``read(path, fields)``.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import math
import os
import struct
import warnings
from typing import Any

import numpy as np

from ._headers import fields_of
from ._limits import KilledError, NotRecordedError, unknown
from ._objects import SURFACES, TEXTURES, AffineTransformation3d, BucketMap_VOID, Graph
from ._volumes import CODES, DTYPES, TYPES, VolumeBase

Fields = dict[str, Any]
_REFERENTIALS = {
    1: "Scanner-based anatomical coordinates",
    2: "Coordinates aligned to another file or to anatomical truth",
}


def side_fields(path: str) -> Fields:
    """What a ``.minf`` beside a file says."""
    try:
        with open(path + ".minf") as file:
            text = file.read()
    except OSError:
        return {}
    return dict(ast.literal_eval(text.partition("=")[2].strip()))


def _write_side(path: str, fields: Fields) -> None:
    with open(path + ".minf", "w") as file:
        file.write(f"attributes = {fields!r}\n")


def _named(shape: tuple[int, ...]) -> Fields:
    names = ("sizeX", "sizeY", "sizeZ", "sizeT")
    return dict(zip(names, shape, strict=False))


class _Gis:
    extensions = (".ima", ".dim")
    writes = (".ima",)

    def header(self, path: str) -> Fields | None:
        try:
            with open(_beside(path, ".dim")) as file:
                words = file.read().split()
            os.stat(_beside(path, ".ima"))
            first = next(n for n, word in enumerate(words) if word.startswith("-"))
            shape = tuple(map(int, words[:first]))
            said = dict(zip(words[first::2], words[first + 1 :: 2], strict=True))
            code = said["-type"]
            steps = [float(said.get(f"-d{axis}", 1)) for axis in "xyzt"]
            if code not in DTYPES or not shape or said["-om"] != "binar":
                return None
        except (OSError, ValueError, KeyError, StopIteration):
            return None
        shape = shape + (1,) * (4 - len(shape))
        return {
            "volume_dimension": list(shape),
            **_named(shape),
            "voxel_size": steps + [1.0] * (len(shape) - 4),
            "object_type": "Volume",
            "data_type": code,
            "ascii": 0,
            "byte_swapping": int(said.get("-bo", "DCBA") != "DCBA"),
            "file_type": "GIS",
        }

    def read(self, path: str, fields: Fields) -> np.ndarray:
        dtype = DTYPES[fields["data_type"]]
        shape = fields["volume_dimension"]
        with open(_beside(path, ".ima"), "rb") as file:
            content = file.read(math.prod(shape) * dtype.itemsize)
        if len(content) < math.prod(shape) * dtype.itemsize:
            raise unknown(f"{path}: unexpected end of file")
        flat = np.frombuffer(content, dtype)
        return (flat.byteswap() if fields["byte_swapping"] else flat).reshape(shape, order="F")

    def write(self, volume: VolumeBase, path: str) -> None:
        fields = fields_of(volume.header())
        steps = " ".join(
            f"-d{axis} {size:.15g}"
            for axis, size in zip("xyzt", fields["voxel_size"], strict=False)
        )
        with open(path, "wb") as file:
            file.write(np.asarray(volume).tobytes(order="F"))
        with open(_beside(path, ".dim"), "w") as file:
            file.write(f"{' '.join(map(str, volume.shape))}\n-type {volume.code}\n{steps}\n")
            file.write("-bo DCBA\n-om binar\n")
        _write_side(path, {**fields, "data_type": volume.code, "object_type": "Volume"})


class _Nifti:
    extensions = (".nii", ".nii.gz")
    writes = extensions

    def header(self, path: str) -> Fields | None:
        import nibabel
        from nibabel import orientations

        try:
            # Straight from its bytes: nibabel's own images forget the slope.
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                found = nibabel.Nifti1Header.from_fileobj(io.BytesIO(file.read(348)))
        except Exception:
            return None
        code = CODES.get(found.get_data_dtype().newbyteorder("="))
        if code is None:
            raise NotRecordedError(f"NIfTI of {found.get_data_dtype()}")
        disk, slope = code, float(found["scl_slope"])
        if slope != 0 and disk != "DOUBLE":
            code = "FLOAT"
        placed = [
            (int(found[f"{kind}form_code"]), affine)
            for kind, affine in (("q", found.get_qform()), ("s", found.get_sform()))
            if found[f"{kind}form_code"]
        ]
        if not placed:
            raise NotRecordedError("NIfTI without q/sform")
        if len(placed) == 2 and np.allclose(*(affine for _, affine in placed), atol=1e-5):
            del placed[1]
        stored = tuple(map(int, found.get_data_shape()))
        spatial = (*stored, 1, 1, 1)[:3]
        turn = orientations.ornt_transform(
            orientations.io_orientation(placed[-1][1]), orientations.axcodes2ornt("LPI")
        )
        to_stored = orientations.inv_ornt_aff(turn, spatial)
        order = np.argsort(turn[:, 0])
        shape = tuple(spatial[axis] for axis in order) + (stored[3:] or (1,))
        zooms = [float(size) for size in found["pixdim"][1 : len(stored) + 1]]
        zooms += [1.0] * (len(shape) - len(zooms))
        steps = [zooms[axis] for axis in order] + [size or 1.0 for size in zooms[3:]]
        scaling = np.diag([1 / steps[0], 1 / steps[1], 1 / steps[2], 1])
        to_space = [affine @ to_stored @ scaling for _, affine in placed]
        possible = list(dict.fromkeys((code, disk, "FLOAT", "DOUBLE")))
        fields: Fields = {
            "disk_data_type": disk,
            "bits_allocated": int(found["bitpix"]),
            "data_type": code,
            "scale_factor_applied": False,
            "possible_data_types": possible,
        }
        if slope != 0:
            fields |= {"scale_factor": slope, "scale_offset": float(found["scl_inter"])}
        fields |= dict.fromkeys(("cal_min", "cal_max", "slice_duration", "toffset"), 0.0)
        names = ("freq_dim", "phase_dim", "slice_dim", "slice_code", "slice_start", "slice_end")
        fields |= dict.fromkeys((*names, "xyz_units", "time_units"), 0)
        unknown_codes = [code for code, _ in placed if code not in _REFERENTIALS]
        if unknown_codes:
            raise NotRecordedError(f"NIfTI with the codes {unknown_codes}")
        return fields | {
            "storage_to_memory": [float(n) for n in np.linalg.inv(to_stored).ravel()],
            **_named(shape),
            "volume_dimension": list(shape),
            "voxel_size": steps,
            "tr": steps[3],
            "referentials": [_REFERENTIALS[code] for code, _ in placed],
            "transformations": [[float(n) for n in one.ravel()] for one in to_space],
            "descrip": found["descrip"].item().decode(),
            "aux_file": found["aux_file"].item().decode(),
            "nifti_type": 1,
            "object_type": "Volume",
            "file_type": "NIFTI-1",
        }

    def read(self, path: str, fields: Fields) -> np.ndarray:
        import nibabel
        from nibabel import orientations

        try:
            image = nibabel.Nifti1Image.from_filename(path, mmap=False)
            raw = np.asarray(image.dataobj.get_unscaled())
        except Exception:
            raise unknown(f"{path}: can't read its voxels") from None
        shape = raw.shape + (1,) * (4 - raw.ndim)
        axes = np.reshape(fields["storage_to_memory"], (4, 4))[:3, :3]
        turned = orientations.apply_orientation(
            raw.reshape(shape), orientations.io_orientation(np.linalg.inv(np.vstack([
                np.hstack([np.linalg.inv(axes), np.zeros((3, 1))]), [0, 0, 0, 1]
            ])))
        )  # fmt: skip
        slope = fields.get("scale_factor", 0)
        if slope:
            turned = turned * slope + fields["scale_offset"]
        if list(turned.shape) != fields["volume_dimension"]:
            raise NotRecordedError("reading what a .minf says has other sizes")
        return turned.astype(turned.dtype.newbyteorder("="), copy=False)

    def write(self, volume: VolumeBase, path: str, forced: bool) -> None:
        import nibabel

        fields = fields_of(volume.header())
        if fields.get("referentials"):
            raise NotRecordedError("writing a volume that lies somewhere")
        (nx, ny, nz), (dx, dy, dz) = volume.shape[:3], fields["voxel_size"][:3]
        affine = np.diag([dx, dy, dz, 1.0])
        affine[:3, 3] = nx * dx / 2 - (nx - 1) * dx, -ny * dy / 2, -nz * dz / 2
        values = np.asarray(volume)[::-1, ::-1, ::-1]
        while values.ndim > 3 and values.shape[-1] == 1:
            values = values[..., 0]
        slope = 0.0 if forced or volume.code not in ("FLOAT", "DOUBLE") else _distance(values)
        if slope:
            values = np.rint(values / slope).astype(np.int16)
        image = nibabel.Nifti1Image(values, affine, dtype=values.dtype)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        content = bytearray(image.to_bytes())
        content[112:120] = struct.pack("<ff", slope, 0)
        with (gzip.open if path.endswith(".gz") else open)(path, "wb") as file:
            file.write(content)
        _write_side(path, {"data_type": volume.code, "object_type": "Volume"})


def _distance(values: Any) -> float:
    """That of numbers which AIMS writes as scaled int16; 0 for others."""
    for slope in (1, 1 / 2, 1 / 3):
        steps = values / slope
        fits = np.isfinite(steps).all() and abs(steps).max() < 32767
        if fits and np.allclose(steps, np.rint(steps), rtol=0, atol=1e-4):
            return slope
    return 0.0


_SCALARS = struct.Struct("<I")


class _Steps:
    """What ``.mesh``, ``.tex`` and ``.bck`` have in common: all numbers are little-endian."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self.content = file.read()
        self.place = 0

    def take(self, count: int) -> bytes:
        found = self.content[self.place : self.place + count]
        self.place += count
        if len(found) < count:
            raise EOFError
        return found

    def number(self) -> int:
        return int(_SCALARS.unpack(self.take(4))[0])

    def array(self, dtype: str, *shape: int) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer(self.take(nbytes), dtype).reshape(shape)

    def start(self) -> str:
        if self.take(9) != b"binarDCBA":
            raise ValueError
        return self.take(self.number()).decode()


def _u4(*numbers: int) -> bytes:
    return b"".join(map(_SCALARS.pack, numbers))


class _Mesh:
    extensions = (".mesh",)
    writes = extensions

    def header(self, path: str) -> Fields | None:
        try:
            steps = _Steps(path)
            code = steps.start()
            sides, count, _, vertices = (steps.number() for _ in range(4))
        except (OSError, EOFError, ValueError):
            return None
        return {
            "file_type": "MESH",
            "data_type": code,
            "ascii": 0,
            "byte_swapping": 0,
            "polygon_dimension": sides,
            "nb_t_pos": count,
            "vertex_number": vertices,
        }

    def read(self, path: str, fields: Fields) -> Any:
        mesh = SURFACES[fields["polygon_dimension"]]()
        steps = _Steps(path)
        steps.start()
        steps.take(8)
        try:
            for _ in range(fields["nb_t_pos"]):
                steps.take(4)
                vertex = steps.array("<f4", steps.number(), 3)
                normal = steps.array("<f4", steps.number(), 3)
                steps.take(steps.number() * 0)
                polygon = steps.array("<u4", steps.number(), mesh.sides)
                mesh._add(vertex, normal, polygon)
        except EOFError:
            raise KilledError(f"{path} is truncated: all memory is eaten") from None
        return mesh

    def write(self, mesh: Any, path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"binarDCBA" + _u4(4) + b"VOID" + _u4(mesh.sides, len(mesh)))
            for time, arrays in enumerate(mesh._steps):
                vertex, normal, polygon = arrays
                file.write(_u4(time, len(vertex)) + vertex.tobytes())
                file.write(_u4(len(normal)) + normal.tobytes() + _u4(0))
                file.write(_u4(len(polygon)) + polygon.tobytes())
        _write_side(path, {})


class _Tex:
    extensions = (".tex",)
    writes = extensions

    def header(self, path: str) -> Fields | None:
        try:
            steps = _Steps(path)
            code = steps.start()
            count, _, vertices = (steps.number() for _ in range(3))
        except (OSError, EOFError, ValueError):
            return None
        return {
            "nb_t_pos": count,
            "file_type": "TEX",
            "data_type": code,
            "ascii": 0,
            "byte_swapping": 0,
            "vertex_number": vertices,
            "object_type": "Texture",
        }

    def read(self, path: str, fields: Fields) -> Any:
        texture = TEXTURES[fields["data_type"]]()
        steps = _Steps(path)
        steps.start()
        dtype = DTYPES[fields["data_type"]].newbyteorder("<").str
        try:
            for _ in range(steps.number()):
                steps.take(4)
                texture._add(steps.array(dtype, steps.number()))
        except EOFError:
            raise NotRecordedError("reading a truncated .tex") from None
        return texture

    def write(self, texture: Any, path: str) -> None:
        with open(path, "wb") as file:
            name = texture.code.encode()
            file.write(b"binarDCBA" + _u4(len(name)) + name + _u4(len(texture)))
            for time, values in enumerate(texture._steps):
                file.write(_u4(time, len(values)) + values.tobytes())
        _write_side(path, {"data_type": texture.code, "object_type": "Texture"})


class _Gifti:
    extensions = (".gii",)
    writes = extensions

    def header(self, path: str) -> Fields | None:
        try:
            image = _gifti(path)
        except Exception:
            return None
        fields: Fields = {
            "GIFTI_metadata": list(image.meta),
            "GIFTI_version": image.version,
            "GIFTI_dataarrays_info": [_attributes(array) for array in image.darrays],
            "file_type": "GIFTI",
        }
        points, triangles = _points(image), _triangles(image)
        if points is not None and triangles is not None:
            return fields | {
                "vertex_number": len(points),
                "nb_t_pos": 1,
                "polygon_dimension": int(triangles.shape[1]),
                "object_type": "Mesh",
                "polygon_number": len(triangles),
                "data_type": "VOID",
            }
        first = image.darrays[0].data
        return fields | {
            "object_type": "Texture",
            "data_type": CODES[first.dtype],
            "texture_dimension": 1,
            "vertex_number": len(first),
            "texture_number": 1,
        }

    def read(self, path: str, fields: Fields) -> Any:
        image = _gifti(path)
        if fields["object_type"] == "Texture":
            texture = TEXTURES[fields["data_type"]]()
            for array in image.darrays:
                texture._add(array.data)
            return texture
        points, triangles = _points(image), _triangles(image)
        mesh = SURFACES[fields["polygon_dimension"]]()
        mesh._add(points, np.zeros_like(points), triangles)
        return mesh

    def write(self, thing: Any, path: str) -> None:
        from nibabel import gifti

        if hasattr(thing, "vertex"):
            [(vertex, _, polygon)] = thing._steps
            arrays = [
                gifti.GiftiDataArray(vertex, "NIFTI_INTENT_POINTSET"),
                gifti.GiftiDataArray(polygon.astype("i4"), "NIFTI_INTENT_TRIANGLE"),
            ]
        else:
            arrays = [gifti.GiftiDataArray(values) for values in thing._steps]
        gifti.GiftiImage(darrays=arrays).to_filename(path)
        _write_side(path, {})


def _gifti(path: str) -> Any:
    import nibabel

    return nibabel.GiftiImage.from_filename(path)


def _points(image: Any) -> Any:
    arrays = image.get_arrays_from_intent("NIFTI_INTENT_POINTSET")
    return arrays[0].data if arrays else None


def _triangles(image: Any) -> Any:
    arrays = image.get_arrays_from_intent("NIFTI_INTENT_TRIANGLE")
    return arrays[0].data if arrays else None


def _attributes(array: Any) -> list[str]:
    surface = array.data.ndim > 1
    return [*([] if surface else ["data_type"]), "dimensions", "encoding", "ind_ord", "intent"]


class _Trm:
    extensions = (".trm",)
    writes = extensions

    def header(self, path: str) -> Fields | None:
        try:
            _trm(path)
        except (OSError, ValueError):
            return None
        return {
            "object_type": "AffineTransformation3d",
            "data_type": "VOID",
            "volume_dimension": [1, 1, 1, 1],
            "file_type": "TRM",
        }

    def read(self, path: str, fields: Fields) -> Any:
        return AffineTransformation3d(_trm(path))

    def write(self, motion: Any, path: str) -> None:
        matrix = motion.toMatrix()
        rows = [matrix[:3, 3], *matrix[:3, :3]]
        with open(path, "w") as file:
            file.writelines(" ".join(f"{n:.15g}" for n in row) + "\n" for row in rows)
        _write_side(path, {"data_type": "VOID", "object_type": "AffineTransformation3d"})


def _trm(path: str) -> np.ndarray:
    with open(path) as file:
        numbers = [float(word) for word in file.read().split()]
    rows = np.reshape(numbers, (4, 3))
    matrix = np.eye(4)
    matrix[:3, 3], matrix[:3, :3] = rows[0], rows[1:]
    return matrix


class _Bck:
    extensions = (".bck",)
    writes = extensions

    def header(self, path: str) -> Fields | None:
        try:
            steps = _Steps(path)
            code = steps.start()
            sizes = steps.array("<f4", 4)
        except (OSError, EOFError, ValueError):
            return None
        return {
            "file_type": "BCK",
            "data_type": code,
            "ascii": 0,
            "byte_swapping": 0,
            "voxel_size": [float(size) for size in sizes],
            "object_type": "Bucket",
        }

    def read(self, path: str, fields: Fields) -> Any:
        bucket = BucketMap_VOID()
        steps = _Steps(path)
        try:
            steps.start()
            steps.take(16)
            for _ in range(steps.number()):
                time = steps.number()
                bucket._buckets[time] = steps.array("<i2", steps.number(), 3)
        except EOFError:
            raise unknown(f"{path}: unexpected end of file") from None
        return bucket

    def write(self, bucket: Any, path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"binarDCBA" + _u4(4) + b"VOID" + np.ones(4, "<f4").tobytes())
            file.write(_u4(len(bucket)))
            for time, voxels in bucket._buckets.items():
                file.write(_u4(time, len(voxels)) + voxels.astype("<i2").tobytes())


class _Arg:
    extensions = (".arg",)
    writes = extensions

    def header(self, path: str) -> Fields | None:
        try:
            with open(path) as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError):
            return None
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines or not lines[0].startswith("*BEGIN GRAPH"):
            return None
        syntax = lines[0].split()[-1]
        fields = {"file_type": "ARG", "object_type": "Graph", "data_type": "VOID"}
        return fields | {"arg_syntax": syntax}

    def read(self, path: str, fields: Fields) -> Any:
        graph = Graph(fields["arg_syntax"])
        open_at: list[dict[str, Any]] = [graph._attributes]
        with open(path) as file:
            lines = [line.strip() for line in file]
        if sum(line.startswith("*BEGIN") for line in lines) != lines.count("*END"):
            raise KilledError(f"{path} is truncated: reading it never ends")
        for line in lines:
            if not line or line.startswith(("#", "*BEGIN GRAPH")):
                continue
            if line.startswith("*BEGIN"):
                open_at.append({})
                if line.split()[1] == "NODE":
                    graph._vertices.append(open_at[-1])
            elif line == "*END":
                open_at.pop()
            else:
                name, _, value = line.partition(" ")
                open_at[-1][name] = value.strip()
        return graph

    def write(self, graph: Any, path: str) -> None:
        lines = ["# graph 1.0", f"*BEGIN GRAPH {graph.getSyntax()}"]
        lines += [f"{name} {value}" for name, value in graph._attributes.items()]
        for vertex in graph._vertices:
            lines += ["*BEGIN NODE fold", *(f"{n} {value}" for n, value in vertex.items()), "*END"]
        with open(path, "w") as file:
            file.write("\n".join([*lines, "*END"]) + "\n")


FORMATS = {
    "GIS": _Gis(),
    "NIFTI-1": _Nifti(),
    "MESH": _Mesh(),
    "GIFTI": _Gifti(),
    "TEX": _Tex(),
    "TRM": _Trm(),
    "BCK": _Bck(),
    "ARG": _Arg(),
}

_WRITES: dict[type, tuple[str, ...]] = {
    VolumeBase: (".ima", ".nii", ".nii.gz"),
    SURFACES[3].__mro__[1]: (".mesh", ".gii"),
    TEXTURES["FLOAT"].__mro__[1]: (".tex", ".gii"),
    AffineTransformation3d: (".trm",),
    BucketMap_VOID: (".bck",),
    Graph: (".arg",),
}


def _beside(path: str, extension: str) -> str:
    return os.path.splitext(path)[0] + extension


def recognised(path: str) -> tuple[str, Fields] | None:
    """(name of the format, fields of the header) of a file; None for one that isn't known."""
    for name, form in FORMATS.items():
        if path.endswith(form.extensions) and os.path.isfile(path):
            with warnings.catch_warnings(action="ignore"):
                fields = form.header(path)
            if fields is not None:
                said = side_fields(path)
                said.pop("format", None)
                if name in ("GIS", "NIFTI-1") and "volume_dimension" in said:
                    said |= _named(tuple(said["volume_dimension"]))
                return name, {**fields, **said}
    return None


def write(thing: Any, path: str, forced: bool = False) -> None:
    for kind, extensions in _WRITES.items():
        if isinstance(thing, kind):
            # Longest first: .nii.gz before .gz of something else.
            for form in FORMATS.values():
                written = tuple(set(form.writes) & set(extensions))
                if written and path.endswith(written):
                    try:
                        if isinstance(form, _Nifti):
                            form.write(thing, path, forced)
                        else:
                            form.write(thing, path)
                    except OSError:
                        raise unknown(f"can't write {path}") from None
                    return
            with contextlib.suppress(OSError):  # succeeds, and writes nothing of any use
                open(path, "wb").close()
            return
    raise AttributeError(f"no Writer for type {type(thing).__name__}")


__all__ = ["FORMATS", "TYPES", "recognised", "write"]
