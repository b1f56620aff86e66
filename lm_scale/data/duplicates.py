# SPDX-License-Identifier: Apache-2.0
"""Documents with the same text as an earlier one of their part of the corpus.

First every unit's hashes are written, 128 bits of BLAKE2b for each document (of 10**12
documents, two different ones share a hash with a chance of 10**-15). Then whoever
tokenizes a unit learns from the hashes of all units which of its rows to drop: the
first document in the corpus's order stays, so that it does not matter who does it.

Memory: 24 bytes for each document of the largest unit, while its hashes are made; then
1 byte for each row of the own units, and some 200 MB, as the hashes are compared in
slices by their first bits.
"""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import numpy as np
import tensorstore as ts
from rich.console import Console

from lm_scale.data.arrays import CHUNK_TOKENS, Appender, reading
from lm_scale.data.corpus import Text
from lm_scale.data.places import (
    ERRORS,
    commit,
    context,
    is_renamed,
    read_bytes,
    write_bytes,
)
from lm_scale.data.waiting import wait_for
from lm_scale.errors import InputError, one_line

RECORD = "hashes.json"
_SLICES = 256  # by the first 8 bits of a hash
_DOCUMENTS = 4 << 20  # compared at once
_SHARD = 1 << 20  # numbers of a file
_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])


def _folder(unit: int) -> str:
    return f"work/hashes/{unit:05d}"


def write_hashes(
    store: str,
    text: Text,
    unit: int,
    origin: dict[str, Any],
    scratch: str,
    read: Callable[[int], None],
) -> None:
    """Writes the hashes of a unit's documents, unless they are there.

    read: told the characters of some documents that were read.

    Raises:
      InputError: they are there, but of another text; or it cannot be read.
    """
    name, mark = _folder(unit), text.units[unit].fingerprint
    content = read_bytes(store, f"{name}/{RECORD}")
    if content is not None:
        there = json.loads(content)
        if (there["origin"], there["fingerprint"]) != (origin, mark):
            raise InputError(
                f"the hashes in {store}/{name} are of another text than "
                f"{text.units[unit].name} now is; delete {store} and run `prepare` "
                "again."
            )
        return
    hashes, rows = _hashes(text, unit, read)
    path = f"{scratch}/{uuid4().hex}" if is_renamed(store) else f"{store}/{name}"
    array = Appender(f"{path}/array", np.dtype(np.uint64), CHUNK_TOKENS, _SHARD)
    array.append(hashes.view(np.uint64))
    array.finish()
    first = hashes["high"] >> np.uint64(56)
    bounds = np.searchsorted(first, np.arange(_SLICES + 1, dtype=np.uint64))
    record = {
        "documents": hashes.size, "rows": rows, "bounds": bounds.tolist(),
        "fingerprint": mark, "origin": origin,
    }  # fmt: skip
    write_bytes(path, RECORD, json.dumps(record).encode())
    if is_renamed(store):
        commit(path, os.path.join(store, name))


def _hashes(
    text: Text, unit: int, read: Callable[[int], None]
) -> tuple[np.ndarray, int]:
    """A unit's hashes and rows, sorted, [documents] of _ROW; the number of its rows."""
    digests, rows, characters = bytearray(), [], 0
    for row, document in text.read(text.units[unit]):
        if document is not None:
            digests += hashlib.blake2b(document.encode(), digest_size=16).digest()
            rows.append(row)
            characters += len(document)
            if characters > 1 << 20:
                read(characters)
                characters = 0
    read(characters)
    found = np.empty(len(rows), _ROW)
    halves = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    found["high"], found["low"], found["row"] = halves[:, 0], halves[:, 1], rows
    found.sort(order=("high", "low", "row"))
    return found, rows[-1] + 1 if rows else 0


def find_duplicates(
    store: str, units: int, own: range, console: Console
) -> dict[int, np.ndarray]:
    """For each of the own units, if a row is to be dropped, bool [rows].

    Waits for the hashes of all units; StorageError if they do not come.
    """
    names = [f"{_folder(unit)}/{RECORD}" for unit in range(units)]
    records = [
        json.loads(content)
        for content in wait_for(store, names, "the hashes of their units", console)
    ]
    dropped = {unit: np.zeros(records[unit]["rows"], bool) for unit in own}
    bounds = np.array([record["bounds"] for record in records])
    total = sum(record["documents"] for record in records)
    slices = 1 << min(8, max(0, -(-total // _DOCUMENTS) - 1).bit_length())
    edges = bounds[:, :: _SLICES // slices]
    for number in range(slices):
        spans = edges[:, number : number + 2]
        found = _read(store, spans)
        unit = np.repeat(np.arange(units), spans[:, 1] - spans[:, 0])
        for i in _later(found):
            if (mask := dropped.get(int(unit[i]))) is not None:
                mask[int(found["row"][i])] = True
    return dropped


def _read(store: str, spans: np.ndarray) -> np.ndarray:
    """The hashes of each unit from its first to before its second place, in a row."""
    try:
        reads = []
        for unit, (start, stop) in enumerate(spans.tolist()):
            if stop > start:
                spec = reading(f"{store}/{_folder(unit)}/array")
                array = ts.open(spec, read=True, context=context()).result()
                reads.append(array[3 * start : 3 * stop].read())
        values = [read.result() for read in reads]
    except ERRORS as error:
        raise InputError(
            f"the hashes in {store}/work are damaged: {one_line(error, 300)}. Delete "
            f"{store} and run `prepare` again."
        ) from error
    return np.concatenate([np.empty(0, np.uint64), *values]).view(_ROW)


def _later(found: np.ndarray) -> np.ndarray:
    """The places of hashes [n] that stand at an earlier place as well."""
    order = np.lexsort((found["low"], found["high"]))  # keeps the order of equal ones
    high, low = found["high"][order], found["low"][order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return order[1:][same]
