# SPDX-License-Identifier: Apache-2.0
"""Our weights as Hugging Face's tensors, and back: a layer, or a device's part of it.

A family's name table says, for each weight, in which of their tensors it lies. Here a
weight that is not stacked is one of a single layer, so that all have a layer axis.
"""

import math
from collections.abc import Mapping

import numpy as np

from lm_scale.errors import InputError
from lm_scale.models import Model, family_of
from lm_scale.models.layers import HFWeight
from lm_scale.sharding import declarations
from lm_scale.weight_files import Tensor

Range = tuple[int, int]  # of one axis: the first number, and the one after the last


def is_stacked(path: str) -> bool:
    """If the weight of that path has an axis of layers."""
    return path.startswith("blocks.")


def block_to_hf(
    entry: HFWeight, block: np.ndarray, layer: int
) -> dict[str, np.ndarray]:
    """One layer of a weight -> the tensors that hold it, by name; float32."""
    block = np.asarray(block, np.float32)
    parts = np.moveaxis(block, entry.stack_axis, 0) if _several(entry) else block[None]
    tensors = {}
    for name, part in zip(entry.names, parts, strict=True):
        part = part.reshape(entry.matrix_shape(part.shape))
        part = part.T if entry.transpose else part
        tensors[name.format(layer=layer)] = np.ascontiguousarray(part)
    return tensors


def check_tensors(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Reads no values; InputError naming a tensor that is missing or of other shape."""
    names = family_of(model.config).hf_names
    for path, weight in declarations(model).items():
        shape, entry = weight.get_value().shape, names[path]
        layers, block = (shape[0], shape[1:]) if is_stacked(path) else (1, shape)
        expected = entry.matrix_shape(_without_stack(entry, block))
        expected = expected[::-1] if entry.transpose else expected
        for name in (n.format(layer=i) for i in range(layers) for n in entry.names):
            tensor = _find(tensors, name)
            if tensor is None:
                raise InputError(
                    f"The Hugging Face checkpoint has no tensor {name!r}. Does the "
                    "config belong to these weights, and were they saved with the "
                    "model's head?"
                )
            if tensor.shape != expected:
                raise InputError(
                    f"Tensor {name!r} has shape {tensor.shape}, the model expects "
                    f"{expected}. Does the config belong to these weights?"
                )


def read_part(
    path: str,
    entry: HFWeight,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    part: tuple[Range, ...],
) -> np.ndarray:
    """A part of the weight of that path and whole shape, float32; reads nothing else.

    The tensors are those that `check_tensors` has passed.
    """
    found = np.empty([stop - start for start, stop in part], np.float32)
    if not is_stacked(path):
        _read_block(entry, tensors, 0, shape, part, found)
        return found
    for layer, block in zip(range(*part[0]), found, strict=True):
        _read_block(entry, tensors, layer, shape[1:], part[1:], block)
    return found


def _read_block(
    entry: HFWeight,
    tensors: Mapping[str, Tensor],
    layer: int,
    shape: tuple[int, ...],
    part: tuple[Range, ...],
    block: np.ndarray,
) -> None:
    """Fills `block`, a part of one layer whose whole shape is given."""
    names, pieces = entry.names, block[None]
    if _several(entry):
        names = names[slice(*part[entry.stack_axis])]
        pieces = np.moveaxis(block, entry.stack_axis, 0)
    shape, part = _without_stack(entry, shape), _without_stack(entry, part)
    sides = [slice(entry.inputs), slice(entry.inputs, None)]
    runs = [_runs(shape[side], part[side]) for side in sides if shape[side]]
    for name, piece in zip(names, pieces, strict=True):
        tensor = _find(tensors, name.format(layer=layer))
        assert tensor is not None  # checked
        matrix = _read_runs(tensor, runs[::-1] if entry.transpose else runs)
        piece[...] = (matrix.T if entry.transpose else matrix).reshape(piece.shape)


def _runs(shape: tuple[int, ...], part: tuple[Range, ...]) -> list[slice]:
    """What a part takes of axes that are merged into one: contiguous runs, in order.

    Heads 2 to 4 of (heads, head_dim) are one run; of (q k v, heads, head_dim), three.
    """
    cut = max(
        (axis for axis, size in enumerate(shape) if part[axis] != (0, size)), default=0
    )
    outer = [0]
    for size, (start, stop) in zip(shape[:cut], part[:cut], strict=True):
        outer = [i * size + j for i in outer for j in range(start, stop)]
    inner = math.prod(shape[cut + 1 :])
    size, (start, stop) = shape[cut], part[cut]
    return [slice((i * size + start) * inner, (i * size + stop) * inner) for i in outer]


def _read_runs(tensor: Tensor, runs: list[list[slice]]) -> np.ndarray:
    """Those runs of a vector's only axis, or of a matrix's rows and columns."""
    if len(runs) == 1:
        return np.concatenate([tensor[run] for run in runs[0]])
    return np.block(
        [[tensor[rows, columns] for columns in runs[1]] for rows in runs[0]]
    )


def _find(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    # Saved without its head, as `openai-community/gpt2`: no `transformer.`.
    return tensors.get(name, tensors.get(name.partition(".")[2]))


def _several(entry: HFWeight) -> bool:
    return len(entry.names) > 1


def _without_stack(entry: HFWeight, axes: tuple) -> tuple:
    """Leaves out the axis on which several tensors lie side by side."""
    axis = entry.stack_axis
    return axes[:axis] + axes[axis + 1 :] if _several(entry) else axes
