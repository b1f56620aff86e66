# SPDX-License-Identifier: Apache-2.0
"""Weights on disk: a folder's safetensors or Flax msgpack files, by torch's names.

transformers 5 has no Flax; what its older versions trained is read from here on.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore
from safetensors import SafetensorError, safe_open

from lm_scale.errors import InputError, flatten, one_line

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = f"{SAFETENSORS}.index.json"
FLAX = "flax_model.msgpack"
NO_PICKLES = (
    "pickles (pytorch_model.bin) are never loaded, as they can run code; convert them "
    "once, where you trust them, with transformers and torch: "
    "AutoModelFor....from_pretrained(...).save_pretrained(...) gives model.safetensors"
)
# Of safetensors. An integer alone is no weight: its scale is in another tensor.
_FLOATS = ("F64", "F32", "F16", "BF16")
# The last part of a weight's path, in Flax and in torch.
_TORCH = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class Tensor(Protocol):
    """An array, in memory or on disk, of which one takes slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class StoredTensor:
    """A tensor in a safetensors file; reads the slices that are asked for, no more."""

    def __init__(self, stored, name: str):
        self.stored = stored  # what safetensors' `get_slice` gives; keeps the file open
        self.name = name  # for errors: where it is
        self.shape: tuple[int, ...] = tuple(stored.get_shape())

    def __getitem__(self, index: Any, /) -> np.ndarray:
        dtype = self.stored.get_dtype()
        if dtype not in _FLOATS:  # only now: a tensor that nobody asks for may be any
            raise InputError(
                f"{self.name} is of type {dtype}; expected weights of one of "
                f"{', '.join(_FLOATS)}, as before they were quantized."
            )
        return self.stored[index]


def open_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a folder by their torch names, in the types they are kept in.

    Takes `model.safetensors`, of which only the headers are read here, or else
    `flax_model.msgpack`, which is read whole; each of them in one file or in several
    with an index (`model.safetensors.index.json`). Raises InputError if there is
    neither, for pickles and for a damaged file.
    """
    files, read = _find(folder)
    return {key: x for file in files for key, x in read(file).items()}


def check_weights(folder: Path) -> None:
    """Raises the InputError of `open_tensors` if it would find no weights to read.

    Opens none of them, so it is cheap before long work; damage shows when reading.
    """
    _find(folder)


def _find(folder: Path) -> tuple[list[Path], Callable[[Path], Mapping[str, Tensor]]]:
    """The files of the weights and what opens one of them."""
    for name, read in ((SAFETENSORS, _open_safetensors), (FLAX, _read_flax)):
        if files := files_of(folder, name):
            return files, read
    pickles = any(folder.glob("pytorch_model*.bin"))
    reason = f"; {NO_PICKLES}" if pickles else ": give a folder with weights"
    raise InputError(f"{folder} has neither {SAFETENSORS} nor {FLAX}{reason}.")


def files_of(folder: Path, name: str) -> list[Path]:
    """The file of that name, or those that its index names; none if there is neither.

    Raises InputError for a damaged index.
    """
    if (folder / name).exists():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.exists():
        return []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        if any(file != Path(file).name for file in files):
            raise ValueError(f"not all are names of files beside it: {files!r:.100}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not a readable index of weight files: {error!r}"
        ) from error
    return [folder / file for file in files]


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, framework="numpy")
        return {
            key: StoredTensor(file.get_slice(key), f"Tensor {key!r} in {path}")
            for key in file.keys()  # noqa: SIM118
        }
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot read {path}: {error}") from error


def _read_flax(path: Path) -> dict[str, np.ndarray]:
    """The weights of one msgpack file; entries that are no weights are left out."""
    # Nothing in the file is executed. Read in the source of flax 0.12.8 and 0.12.12:
    # msgpack_restore unpacks plain msgpack; its hook knows three extension types, of
    # which an array is a shape, the name of a dtype and bytes for np.frombuffer, which
    # refuses objects, and the others are a complex number and an array's one element.
    # Large arrays come as dictionaries of chunks, joined by np.concatenate. Neither
    # pickle nor a lookup of classes or functions by name is anywhere on this path.
    try:
        tree = msgpack_restore(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"expected a tree of weights, found {tree!r:.40}")
        weights = flatten(tree)
    except Exception as error:  # damaged bytes fail wherever they happen to
        raise InputError(
            f"Cannot read {path} as Flax weights: {one_line(error, 200)}. Copy the "
            "file again."
        ) from error
    return dict(
        _as_torch(name, array)
        for name, array in weights.items()
        if isinstance(array, np.ndarray) and jnp.issubdtype(array.dtype, jnp.floating)
    )


def _as_torch(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, _, kind = name.rpartition(".")
    # A Dense kernel is (inputs, outputs), torch's Linear (outputs, inputs). GPT-2's
    # Conv1D is the other way round in both: FlaxConv1D keeps (outputs, inputs).
    array = array.T if kind == "kernel" else array
    return f"{module}.{_TORCH.get(kind, kind)}".lstrip("."), array
