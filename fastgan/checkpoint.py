"""One safetensors file in, one out.

A checkpoint is a tree of dicts, lists and tuples whose leaves are tensors, numbers, strings, bytes,
booleans and None. The tensors are those of an ordinary safetensors file, contiguous and named by
their path in the tree, so that any safetensors reader finds them. The rest of the tree is JSON in
the file's metadata under ``"fastgan"``, where ``{"$tensor": name, "stride": [...]}`` stands for a
tensor. Nothing in a file is ever executed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import shutil
import types
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import safetensors
    import safetensors.torch
except ImportError as error:
    raise ImportError(
        "fastgan.checkpoint needs safetensors: pip install 'fastgan[train]'"
    ) from error

__all__ = ["CheckpointError", "dumps", "load", "loads", "read_header", "save"]

_VERSION = 1

_DTYPES = frozenset(
    {
        torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32,
        torch.uint64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    }
)  # fmt: skip


class CheckpointError(Exception):
    """A file is no checkpoint that this version reads, or a checkpoint could not be written."""


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Write `state` to `path`, completely or not at all.

    The bytes go to ``<path>.tmp`` and reach the disk before that file takes the name, so a crash, a
    kill or a full disk leaves what `path` held before.

    Args:
        path: ends in ``.safetensors``; its folder exists.
        state: tree of dicts, lists, tuples, tensors, NumPy arrays, int, float, bool, str, bytes and
            None. Dict keys may be any of these but tensors, arrays and dicts. Tensors that are the
            same memory under the same shape and strides are stored once.

    Raises:
        TypeError: something in `state` cannot be stored; names where it is.
        ValueError: `path` has another ending.
        CheckpointError: the file could not be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save: path must end in .safetensors, got {path}")
    content = dumps(state)
    try:
        replace_file(path, content)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error.strerror or error}") from error


def dumps(state: Any) -> bytes:
    """What `save` would write to a file; `loads` reads it.

    Raises:
        TypeError: something in `state` cannot be stored; names where it is.
    """
    encoder = _Encoder()
    tree = encoder.encode(state, ())
    header = json.dumps({"version": _VERSION, "tree": tree}, allow_nan=False)
    return safetensors.torch.save(encoder.tensors, {"format": "pt", "fastgan": header})


def loads(content: bytes) -> Any:
    """The tree that `dumps` made `content` of, on the CPU; for what this process's peers sent."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])["__metadata__"]["fastgan"]
    tensors = types.SimpleNamespace(get_tensor=safetensors.torch.load(content).__getitem__)
    return _Decoder(tensors, torch.device("cpu")).decode(json.loads(header)["tree"])


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """The tree that `save` wrote, equal in every bit, dtype and stride; tied tensors tied again.

    Tensors without dense strides (a slice, an expanded tensor) come back dense, in the same order
    of dimensions. Arrays stay on the CPU whatever `device` is; so must random number generators'
    states, which is why checkpoints that hold some are loaded to the CPU, the default.

    Raises:
        CheckpointError: `path` is missing, damaged or no checkpoint of fastgan.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tree = _read_tree(path, file.metadata())
            return _Decoder(file, torch.device(device)).decode(tree)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
    except FileNotFoundError:
        raise CheckpointError(f"could not read {path}: no such file or folder") from None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header ({error})") from error


def read_header(path: str | os.PathLike[str]) -> Any:
    """The tree of `path` with tensors on the ``meta`` device: shapes and dtypes, no data read.

    Raises:
        CheckpointError: as `load`.
    """
    return load(path, "meta")


class _Encoder:
    """Turns a tree into JSON and collects its tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Hashable, str] = {}

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, list):
            return [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": self.encode(list(value), path)}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(item, (*path, key)) for key, item in value.items()}
            return {
                "$dict": [
                    [self.encode(key, (*path, str(key))), self.encode(item, (*path, str(key)))]
                    for key, item in value.items()
                ]
            }
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            array = torch.from_numpy(np.array(value, order="C"))
            return {"$array": self._store(_storable(array, path), path)}
        raise TypeError(
            f"save: {_at(path)} is a {type(value).__name__}, which has no place in a file"
        )

    def _tensor(self, tensor: Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        identity = _identity(_storable(tensor, path))
        if identity not in self._names:
            self._names[identity] = self._store(tensor, path)
        entry: dict[str, Any] = {"$tensor": self._names[identity]}
        stride = torch.empty_like(tensor, device="meta").stride()
        if stride != torch.empty(tensor.shape, device="meta").stride():
            entry["stride"] = list(stride)
        return entry

    def _store(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        name = self._free_name(path)
        self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        return name

    def _free_name(self, path: tuple[str, ...]) -> str:
        name = stem = ".".join(path) or "state"
        copies = 1
        while name in self.tensors or name == "__metadata__":  # the format's own reserved name
            copies += 1
            name = f"{stem}~{copies}"
        return name


class _Decoder:
    """Turns what `_Encoder` made back into the tree. Trusts nothing: files come from anywhere."""

    def __init__(self, file: Any, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def decode(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case list():
                return [self.decode(item) for item in value]
            case {"$tuple": list(items)}:
                return tuple(self.decode(items))
            case {"$dict": list(pairs)}:
                return {self.decode(key): self.decode(item) for key, item in pairs}
            case {"$float": str(text)}:
                return float(text)
            case {"$bytes": str(text)}:
                return base64.b64decode(text, validate=True)
            case {"$array": str(name)}:
                return self._file.get_tensor(name).numpy().copy()
            case {"$tensor": str(name), **layout}:
                if name not in self._tensors:
                    self._tensors[name] = self._tensor(name, layout.get("stride"))
                return self._tensors[name]
            case dict() if not any(key.startswith("$") for key in value):
                return {key: self.decode(item) for key, item in value.items()}
        raise ValueError(f"unknown entry {str(value)[:80]}")

    def _tensor(self, name: str, stride: Any) -> Tensor:
        stored = self._file.get_tensor(name)  # memory-mapped: nothing is read before the copy
        if stride is None:
            return torch.empty(stored.shape, dtype=stored.dtype, device=self._device).copy_(stored)
        if not _is_dense(stored.shape, stride):
            raise ValueError(f"stride {stride} does not fit {name!r} of shape {list(stored.shape)}")
        return torch.empty_strided(
            stored.shape, stride, dtype=stored.dtype, device=self._device
        ).copy_(stored)


def _storable(tensor: Tensor, path: tuple[str, ...]) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"save: {_at(path)} is a tensor that safetensors cannot hold "
            f"({tensor.dtype}, {tensor.layout}, {tensor.device})"
        )
    return tensor


def _identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors if writing to one writes to the other, element for element."""
    if tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _is_dense(shape: torch.Size, stride: Any) -> bool:
    """Whether the elements fill their memory without gap or overlap."""
    if not isinstance(stride, list) or len(stride) != len(shape):
        return False
    if not all(type(step) is int and 0 <= step < 2**63 for step in stride):
        return False
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _read_tree(path: Path, metadata: dict[str, str] | None) -> Any:
    if not metadata or "fastgan" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one that fastgan wrote")
    header = json.loads(metadata["fastgan"])
    if header["version"] != _VERSION:
        raise CheckpointError(
            f"{path}: written in format {header['version']}, this fastgan reads {_VERSION}; "
            "load it with the version of fastgan that wrote it"
        )
    return header["tree"]


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file that is no safetensors file seems to be."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "the file is empty"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            "a pickle (.pt, .pth), which can run code when it is loaded; "
            "fastgan reads its own safetensors checkpoints only; "
            "for public CycleGAN weights, name a .pth file or the folder with "
            "latest_net_G_A.pth and latest_net_G_B.pth"
        )
    return f"truncated, or no safetensors file ({error})"


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path` in one step that survives a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _at(path: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)
