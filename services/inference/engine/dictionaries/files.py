"""Files of tensors: names and shapes at once, values only when asked for, code in them never run.

safetensors hold nothing but tensors. `.npz` is read with `allow_pickle=False` and `.pt` with
`torch.load(weights_only=True)`, so a pickle that would run something is refused.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine import hub

Shape = tuple[int, ...]


class TensorFile:
    """One file. Values come as they were when it was opened; a file changed since is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: Mapping[str, Shape]
        self.notes: Mapping[str, Any] = {}
        """What a `.pt` holds beside tensors: strings, numbers, mappings."""
        self._stamp = _stamp(path)
        match path.suffix:
            case ".safetensors":
                self.shapes = self._safetensors_shapes()
            case ".npz":
                self.shapes = self._npz_shapes()
            case _:
                held = self._torch()
                self.shapes = {k: tuple(v.shape) for k, v in held.items() if isinstance(v, Tensor)}
                self.notes = {k: v for k, v in held.items() if not isinstance(v, Tensor)}

    def read(self, name: str) -> Tensor:
        """A tensor in float32 on the CPU. Raises FailedPrecondition if a value is not finite."""
        try:
            if _stamp(self.path) != self._stamp:
                raise FailedPrecondition(f"{self.path} has changed since the service started")
            tensor = self._read(name).detach().to(torch.float32, copy=True)
        except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise FailedPrecondition(
                f"{self.path}: tensor {name!r} is not readable: {hub.sentence(error)}"
            ) from error
        if not tensor.isfinite().all():
            raise FailedPrecondition(f"{self.path}: tensor {name!r} holds a NaN or an infinity")
        return tensor

    def _read(self, name: str) -> Tensor:
        match self.path.suffix:
            case ".safetensors":
                with safe_open(self.path, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(name)
            case ".npz":
                with np.load(self.path, allow_pickle=False) as arrays:
                    tensor = torch.from_numpy(arrays[name])
            case _:
                tensor = self._torch()[name]
        return tensor

    def number(self, name: str) -> float:
        """The value of a tensor of one element."""
        tensor = self.read(name)
        if tensor.numel() != 1:
            raise FailedPrecondition(
                f"{self.path}: tensor {name!r} should be one number and is "
                f"{list(self.shapes[name])}"
            )
        return float(tensor)

    def require(self, required: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Raises FailedPrecondition unless these tensors are there, and no others but optional."""
        required = list(required)
        missing = [name for name in required if name not in self.shapes]
        extra = sorted(set(self.shapes) - set(required) - set(optional))
        if missing or extra:
            faults = [f"lacks {name!r}" for name in missing]
            faults += [f"has {name!r} {list(self.shapes[name])}, unknown here" for name in extra]
            raise FailedPrecondition(f"{self.path} {', '.join(faults)}; it holds {self._listed()}")

    def length(self, name: str) -> int:
        """The length of a vector."""
        shape = self.shapes[name]
        if len(shape) != 1:
            raise FailedPrecondition(f"{self.path}: {name!r} should be a vector, is {list(shape)}")
        return shape[0]

    def expect(self, name: str, length: int, what: str) -> None:
        """Raises FailedPrecondition unless `name` is a vector of this length."""
        if self.shapes[name] != (length,):
            raise FailedPrecondition(
                f"{self.path}: {name!r} is {list(self.shapes[name])}, but {what} asks for "
                f"[{length}]"
            )

    def _listed(self) -> str:
        return ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())

    def _safetensors_shapes(self) -> dict[str, Shape]:
        try:
            with safe_open(self.path, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FailedPrecondition(
                f"{self.path} is no safetensors file: {hub.sentence(error)}"
            ) from error

    def _npz_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for member in archive.namelist():
                    with archive.open(member) as file:
                        version = np.lib.format.read_magic(file)
                        read = (
                            np.lib.format.read_array_header_1_0
                            if version == (1, 0)
                            else np.lib.format.read_array_header_2_0
                        )
                        shape, _, dtype = read(file)
                    if dtype.hasobject:
                        raise FailedPrecondition(
                            f"{self.path}: array {member!r} holds pickled objects, which could run "
                            "code; nothing of it is read"
                        )
                    shapes[member.removesuffix(".npy")] = tuple(shape)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise FailedPrecondition(
                f"{self.path} is no npz file: {hub.sentence(error)}"
            ) from error
        return shapes

    def _torch(self) -> dict[str, Any]:
        try:
            mapped = zipfile.is_zipfile(self.path)
            held = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise FailedPrecondition(
                f"{self.path} is not a file of tensors alone (weights_only refuses the rest, which "
                f"could run code): {hub.sentence(error)}"
            ) from error
        if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
            raise FailedPrecondition(f"{self.path} holds no state dict of named tensors")
        return held


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FailedPrecondition."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FailedPrecondition(f"{path} is not readable JSON: {hub.sentence(error)}") from error
    if not isinstance(content, dict):
        raise FailedPrecondition(f"{path} should hold a JSON object")
    return content


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
