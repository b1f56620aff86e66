# SPDX-License-Identifier: Apache-2.0
"""The weight files of an export: who writes which, from devices to a folder.

No host or device holds the model: one layer of one weight at a time is gathered, for
the process that writes it. A process holds one file's tensors on top of that.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from lm_scale.hf_tensors import block_to_hf, is_stacked
from lm_scale.models import ModelConfig, family_of
from lm_scale.models.layers import HFWeight
from lm_scale.weight_files import SAFETENSORS, SAFETENSORS_INDEX

MAX_SHARD = 5 * 10**9  # bytes of tensors in a file, as in transformers
_FILES = (SAFETENSORS, "model-?????-of-?????.safetensors")


@dataclass(frozen=True)
class Block:
    """A layer of a stacked weight, or (layer None) a weight that is not."""

    entry: HFWeight
    weight: jax.Array
    layer: int | None

    @property
    def bytes(self) -> int:
        """In float32."""
        return 4 * math.prod(self.weight.shape[self.layer is not None :])

    @property
    def names(self) -> list[str]:
        """Of the tensors that hold it."""
        return [name.format(layer=self.layer) for name in self.entry.names]


def deal_out(config: ModelConfig, flat: dict[str, jax.Array]) -> list[list[Block]]:
    """What each file is to hold, layer after layer; at most MAX_SHARD or one block."""
    # In the table's order, the same in all processes, as they gather block after block.
    table = family_of(config).hf_names.items()
    weights = [(path, entry) for path, entry in table if path in flat]
    blocks = [
        Block(entry, flat[path], layer)
        for layer in (None, *range(config.layers))
        for path, entry in weights
        if is_stacked(path) == (layer is not None)
    ]
    files, size = [[]], 0
    for block in blocks:
        if files[-1] and size + block.bytes > MAX_SHARD:
            files.append([])
            size = 0
        files[-1].append(block)
        size += block.bytes
    return files


def write_files(files: Sequence[Sequence[Block]], draft: Path, writers: int) -> None:
    """Writes all files into the draft; to be called by each process.

    Process p of the first `writers` ones writes the files p, p + writers ... The draft
    has the settings already.
    """
    process = jax.process_index()
    paths = [draft / name for name in _file_names(len(files))]
    if process == 0 and len(files) > 1:
        _write_index(files, draft)
    # A round is a file for each writer: all of them write at the same time.
    for first in range(0, len(files), writers):
        tensors: dict[str, np.ndarray] = {}
        mine = first + process if process < writers else len(files)
        for number in range(first, min(first + writers, len(files))):
            for block in files[number]:
                whole = _gather(block)
                if number == mine:
                    layer = block.layer or 0
                    tensors |= block_to_hf(block.entry, np.asarray(whole), layer)
        if mine < len(files):
            save_file(tensors, paths[mine], metadata={"format": "pt"})
            # safetensors lets nobody but the owner read; this is a file as the others.
            shutil.copymode(draft / "config.json", paths[mine])
            _flush(paths[mine])


def _file_names(files: int) -> list[str]:
    if files == 1:
        return [SAFETENSORS]
    numbers = range(1, files + 1)
    return [f"model-{number:05}-of-{files:05}.safetensors" for number in numbers]


def _write_index(files: Sequence[Sequence[Block]], draft: Path) -> None:
    weight_map = {
        name: file
        for file, blocks in zip(_file_names(len(files)), files, strict=True)
        for block in blocks
        for name in block.names
    }
    size = sum(block.bytes for blocks in files for block in blocks)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (draft / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _gather(block: Block) -> jax.Array:
    """The block as an array that this process can read; each process calls it."""
    weight, whole = block.weight, None
    if not weight.is_fully_addressable:
        assert isinstance(weight.sharding, NamedSharding)
        whole = NamedSharding(weight.sharding.mesh, PartitionSpec())
    elif block.layer is None:
        return weight
    # Waited for, or the processes that do not read it would run ahead of the one that
    # does, and fill their devices.
    return _take(weight, block.layer, whole).block_until_ready()


@functools.partial(jax.jit, static_argnums=2)
def _take(
    weight: jax.Array, layer: int | None, sharding: NamedSharding | None
) -> jax.Array:
    """The layer's number is traced, so that all layers share a program."""
    if layer is not None:
        weight = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return weight if sharding is None else jax.reshard(weight, sharding)


def _flush(path: Path) -> None:
    """Onto the disk, or a power cut may leave the file's new name empty."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish(draft: Path, folder: Path) -> None:
    """Gives the draft's files their names and removes the weights of an older export.

    What makes a reader see the new weights comes last: the name of the only file, or
    that of the index. Killed on the way, the folder has the old weights, or none if
    there were several files, but never some of each.
    """
    files = {str(path.relative_to(draft)): path for path in draft.rglob("*")}
    files = {name: path for name, path in files.items() if path.is_file()}
    if SAFETENSORS_INDEX in files:
        # The old one may name files that are now replaced, one after the other.
        (folder / SAFETENSORS_INDEX).unlink(missing_ok=True)
    for name, path in sorted(files.items(), key=lambda item: _rank(item[0])):
        if _rank(name) != 1:  # weights were flushed by who wrote them
            _flush(path)
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(path, folder / name)
    older = {path.name for path in folder.iterdir() if _rank(path.name) > 0}
    for name in sorted(older - files.keys(), key=_rank, reverse=True):
        (folder / name).unlink()


def _rank(name: str) -> int:
    """The order in which files get their names: settings, weights, index of weights."""
    if name == SAFETENSORS_INDEX:
        return 2
    return int(any(fnmatchcase(name, pattern) for pattern in _FILES))
