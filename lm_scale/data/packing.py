# SPDX-License-Identifier: Apache-2.0
"""Which pieces of documents make which row, planned ahead for a whole store.

A plan is an index: row -> the pieces in it, each a span of the store's tokens within
one document. It is made once for a store and a row's length, kept as three arrays that
are mapped into memory, and so leaves the rows in random access. About 60 bytes a
document are needed to make it.

Two kinds. `segmented`: the text cut every `seq_len` tokens, documents one after the
other, however that cuts them; the last, shorter row is left out. `packed`: documents
stay whole, those longer than a row are cut into rows and a rest, and all that is
shorter is put together by best-fit-decreasing (Ding et al. 2024, "Fewer Truncations
Improve Language Modeling", arXiv:2404.10830, section 2.2).
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lm_scale.data.ragged import count_up
from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError, one_line

Kind = Literal["segmented", "packed"]
FORMAT = 1  # of a kept plan; another is made anew

_ARRAYS = ("starts", "lengths", "rows")


@dataclass(frozen=True)
class Plan:
    """Row r holds the pieces rows[r] ... rows[r + 1] - 1, in that order."""

    starts: np.ndarray  # int64 [pieces], the first token of each in the store
    lengths: np.ndarray  # int32 [pieces], tokens, at least 1
    rows: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return self.rows.size - 1

    @property
    def tokens(self) -> int:
        """Tokens in all rows; what is missing to rows × seq_len is padding."""
        return int(self.lengths.sum(dtype=np.int64))


def segmented(offsets: np.ndarray, seq_len: int) -> Plan:
    """Rows cut from all documents; a piece ends with its document or its row.

    offsets: int64 [documents + 1], as a store has them.
    """
    count = int(offsets[-1]) // seq_len
    edges = np.arange(count + 1, dtype=np.int64) * seq_len
    cuts = np.concatenate([edges, offsets[offsets < edges[-1]]])
    cuts.sort(kind="stable")  # two sorted halves, which it merges
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]  # both cut here, or an empty document
    pieces = np.searchsorted(cuts, edges)
    return Plan(cuts[:-1], np.diff(cuts).astype(np.int32), pieces)


def packed(offsets: np.ndarray, seq_len: int) -> Plan:
    """Rows of whole documents, best fit first; each token is in one row.

    offsets: int64 [documents + 1], as a store has them.
    """
    sizes = np.diff(offsets)
    counts = -(-sizes // seq_len)  # pieces of each document; none of an empty one
    starts = np.repeat(offsets[:-1], counts) + count_up(counts) * seq_len
    ends = np.minimum(starts + seq_len, np.repeat(offsets[1:], counts))
    lengths = (ends - starts).astype(np.int32)
    rows = best_fit(lengths, seq_len)
    order = np.argsort(rows, kind="stable")
    edges = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
    return Plan(starts[order], lengths[order], edges)


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece by best-fit-decreasing, int64 [n].

    From the longest piece to the shortest, each goes to the row with the least room
    that it fits into, or to a new one. Pieces of one length go at one time, and rows
    with the same room are alike: so the work is by lengths and rooms, of which there
    are `room` at most, and not by pieces. lengths: 1 ... room [n].
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    open_rows = OpenRows(room)
    values, firsts = np.unique(-lengths[order].astype(np.int64), return_index=True)
    placed = [
        open_rows.place(int(-value), int(count))
        for value, count in zip(
            values, np.diff(firsts, append=lengths.size), strict=True
        )
    ]
    rows = np.empty(lengths.size, np.int64)
    rows[order] = np.concatenate(placed) if placed else 0
    return rows


class OpenRows:
    """The rows so far, by the room that is left in them."""

    def __init__(self, room: int):
        self.room, self.count = room, 0
        self.by_room: list[list[np.ndarray]] = [[] for _ in range(room + 1)]
        self.any = np.zeros(room + 1, bool)

    def place(self, length: int, count: int) -> np.ndarray:
        """The rows [count] of so many pieces of one length."""
        placed = []
        while count:
            rows, room = self._best(length, count)
            most = room // length  # of these pieces that go into one row
            taken = rows[: -(-count // most)]
            self._put(room, rows[taken.size :])
            here = np.repeat(taken, most)[:count]
            full, left = divmod(here.size, most)
            self._put(room - most * length, taken[:full])
            if left:
                self._put(room - left * length, taken[full:])
            placed.append(here)
            count -= here.size
        return np.concatenate(placed)

    def _best(self, length: int, count: int) -> tuple[np.ndarray, int]:
        """Rows with the least room that will do, and that room; new ones if none do."""
        fitting = self.any[length:]
        at = int(fitting.argmax())
        if fitting[at]:
            room = length + at
            rows = np.concatenate(self.by_room[room])
            self.by_room[room], self.any[room] = [], False
            return rows, room
        first, self.count = self.count, self.count + -(-count // (self.room // length))
        return np.arange(first, self.count), self.room

    def _put(self, room: int, rows: np.ndarray) -> None:
        if room and rows.size:
            self.by_room[room].append(rows)
            self.any[room] = True


# --- Kept on disk ---------------------------------------------------------------------


def open_plan(store: TokenStore, kind: Kind, seq_len: int, folder: Path) -> Plan:
    """The plan for this store and length that `folder` keeps; made if it does not yet.

    A plan appears whole, by a rename, and never changes, so that processes that make
    the same one at the same time do no harm. A damaged one is made anew.

    Raises:
      InputError: the store cannot be read, or the folder not be written.
    """
    wanted = {
        "format": FORMAT, "kind": kind, "seq_len": seq_len,
        "sha256": store.manifest.sha256, "tokens": store.num_tokens,
        "documents": store.num_documents,
    }  # fmt: skip
    path = Path(folder) / f"{kind}-{seq_len}-{store.manifest.sha256:.16}"
    plan = _read(path, wanted)
    if plan is None:
        make = {"segmented": segmented, "packed": packed}[kind]
        plan = make(_offsets(store), seq_len)
        try:
            _write(path, wanted, plan)
        except OSError as error:
            raise InputError(
                f"the plan of rows cannot be written to {path}: {one_line(error)}. "
                "Make room or give write permission there."
            ) from error
    return _read(path, wanted) or plan  # mapped: its pages are the system's to drop


def _offsets(store: TokenStore) -> np.ndarray:
    step, count = 1 << 20, store.num_documents
    offsets = np.zeros(count + 1, np.int64)
    for first in range(0, count, step):
        last = min(first + step, count)
        offsets[first + 1 : last + 1] = store.lengths(np.arange(first, last))
    return np.cumsum(offsets)


def _read(path: Path, wanted: dict) -> Plan | None:
    try:
        there = json.loads((path / "plan.json").read_text())
        arrays = [np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    except (OSError, ValueError):
        return None  # not there, or damaged
    plan = Plan(*arrays)
    sizes = {"pieces": plan.starts.size, "rows": len(plan)}
    whole = plan.lengths.size == plan.starts.size and plan.rows[-1] == plan.starts.size
    return plan if whole and there == {**wanted, **sizes} else None


def _write(path: Path, wanted: dict, plan: Plan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    try:
        for name, array in asdict(plan).items():
            np.save(new / f"{name}.npy", array)
        sizes = {"pieces": plan.starts.size, "rows": len(plan)}
        (new / "plan.json").write_text(json.dumps({**wanted, **sizes}))
        new.chmod(0o755)  # mkdtemp's is for this user alone
        if _read(path, wanted) is None:
            shutil.rmtree(path, ignore_errors=True)
            try:
                os.rename(new, path)
            except OSError:
                if _read(path, wanted) is None:  # else another process was quicker
                    raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
