# SPDX-License-Identifier: Apache-2.0
"""One-dimensional zarr3 arrays, sharded: written front to back, read anywhere.

A file (shard) holds many chunks, each compressed, checksummed and read by itself.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lm_scale.data.places import ERRORS, cannot_write, context, url_of
from lm_scale.errors import InputError, one_line

# 4 Ki: the least that a read decompresses. A read of one takes less than half of what a
# read of 16 Ki takes, and the store is 2 % larger (1 Ki: 11 %, for a quarter less).
CHUNK_TOKENS = 1 << 12
SHARD_TOKENS = 1 << 24  # 16 Mi: the tokens of a file, and of the writer's buffer


class Appender:
    """A growing array: whole shards go out as soon as they are full.

    Args:
      path: its folder; an array that is there is replaced.
      chunk, shard: entries of each; a shard holds a whole number of chunks.

    Raises:
      InputError: nothing can be written there.
    """

    def __init__(self, path: str | Path, dtype: np.dtype, chunk: int, shard: int):
        self._path = path
        spec = _writing(url_of(path), dtype, chunk, shard)
        try:
            self._array = ts.open(
                spec, create=True, delete_existing=True, context=context()
            ).result()
        except ERRORS as error:
            raise InputError(f"cannot write {path}: {one_line(error)}") from error
        self._room = shard
        self._buffers: list[np.ndarray] = []
        self._dtype = dtype
        self._sha256 = hashlib.sha256()
        self._written = 0
        self._filled = 0

    @property
    def size(self) -> int:
        """Entries so far."""
        return self._written + self._filled

    def append(self, values: np.ndarray) -> None:
        """Adds values [n]; StorageError if a full shard cannot be written."""
        values = values.astype(self._dtype, copy=False)
        while values.size:
            part = values[: self._room - self._filled]
            values = values[part.size :]
            self._buffers.append(part)
            self._filled += part.size
            if self._filled == self._room:
                self._flush()

    def finish(self) -> str:
        """Writes what is left; the sha256 of the bytes of all entries."""
        self._flush()
        return self._sha256.hexdigest()

    def _flush(self) -> None:
        """Writes the buffer; the array grows first, so it is never read back."""
        full = np.concatenate([np.empty(0, self._dtype), *self._buffers])
        try:
            array = self._array.resize(exclusive_max=[self.size]).result()
            array[self._written :].write(full).result()
        except ERRORS as error:
            raise cannot_write(self._path, error) from error
        self._sha256.update(full.astype(full.dtype.newbyteorder("<")).data)
        self._written, self._filled, self._buffers = self.size, 0, []


def _writing(url: str, dtype: np.dtype, chunk: int, shard: int) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    compressed = {"name": "zstd", "configuration": {"level": 1}}
    checksum = {"name": "crc32c"}  # a flipped bit is an error, not a token
    sharding = {
        "chunk_shape": [chunk],
        "codecs": [little, compressed, checksum],
        "index_codecs": [little, checksum],
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard]}}
    metadata = {
        "shape": [0],
        "data_type": dtype.name,
        "chunk_grid": grid,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return {
        "driver": "zarr3", "kvstore": url, "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # what is missing is an error
    }  # fmt: skip


def reading(path: str | Path) -> dict[str, Any]:
    """The spec by which tensorstore opens the array in a folder or at a url."""
    return {
        "driver": "zarr3",
        "kvstore": url_of(path),
        # A finished part never changes: do not ask the file system at each read.
        "recheck_cached_data": False,
        "fill_missing_data_reads": False,  # a shard that is gone is no row of zeros
    }


def digest(array: Any) -> str:
    """sha256 of the bytes of all entries of an open array, read shard by shard.

    Raises what tensorstore raises for a shard that is gone or damaged.
    """
    sha256, step = hashlib.sha256(), int(array.chunk_layout.write_chunk.shape[0])
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        values = array[start:stop].read().result()
        sha256.update(values.astype(values.dtype.newbyteorder("<")).data)
    return sha256.hexdigest()
