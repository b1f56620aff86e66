# SPDX-License-Identifier: Apache-2.0
"""Making one store: unit by unit, part by part, by one process or by several.

Whoever comes finds the finished parts and makes the missing ones of his units; a part
is put in place as a whole, so a process may be killed at any moment. When the parts of
all units are there, the manifest is written. What is under way lies in `work/`, which
goes when the store is complete.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
from etils import epath
from rich.console import Console

from lm_scale.data.corpus import Text
from lm_scale.data.duplicates import find_duplicates, write_hashes
from lm_scale.data.encoding import Encoders, Spec, Texts, Tokens
from lm_scale.data.parts import Counts, PartWriter, Record, part_name, read_records
from lm_scale.data.places import is_renamed, remove
from lm_scale.data.progress import Shown
from lm_scale.data.ranks import Rank
from lm_scale.data.store import Manifest, manifest_of, write_manifest
from lm_scale.data.texts import Batch, batches
from lm_scale.errors import InputError, StorageError, differences, flatten
from lm_scale.lock import RunLock

# 64 Mi: what a restart may have to do again, some minutes of one CPU's tokenizing.
PART_TOKENS = 1 << 26
_NOTHING = np.zeros(0, bool)


@dataclass(frozen=True)
class Most:
    """Where to stop reading a part of the corpus; None: at its end."""

    documents: int | None = None
    tokens: int | None = None  # the document that reaches it is the last


@dataclass(frozen=True)
class Job:
    """One store to make."""

    path: str  # folder or url
    text: Text
    spec: Spec
    most: Most
    facts: dict[str, Any]  # of the manifest: tokenizer_hash, vocab_size, separator, ...

    @property
    def origin(self) -> dict[str, Any]:
        """What all parts must share, as JSON has it."""
        units = len(self.text.units)
        return {**self.facts, "units": units, "part_tokens": PART_TOKENS}

    def own(self, rank: Rank) -> range:
        """The units of a rank."""
        return range(rank.index, len(self.text.units), rank.world)


def finished(job: Job) -> list[list[Record]]:
    """The records of all finished parts, by unit.

    Raises:
      InputError: some were made of another text, or otherwise.
    """
    found = read_records(job.path, range(len(job.text.units)))
    for unit, records in zip(job.text.units, found, strict=True):
        for record in records:
            there = {"origin": record.origin, "fingerprint": record.fingerprint}
            here = {"origin": job.origin, "fingerprint": unit.fingerprint}
            if found_differences := differences(flatten(there), flatten(here)):
                raise InputError(
                    f"{job.path} holds finished parts of a store that differs: of "
                    f"{record.name}, {'; '.join(found_differences)}. Delete it, or "
                    "choose another folder; or bring back what has changed."
                )
    return found


def make(
    job: Job, encoders: "Encoders[Label]", rank: Rank, task: str, console: Console
) -> tuple[Manifest | None, int]:
    """Makes a rank's units and, if all others are there, the manifest.

    Returns the manifest, None if some units are missing still, and how many are.

    Raises:
      InputError: text that cannot be read; a store of another origin; another living
        process with the same rank.
      StorageError: the disk is full, or the storage fails. What is finished stays.
      WorkerDied: a worker was killed.
    """
    with _scratch(job.path, rank) as (folder, check):
        dropped = _dropped(job, rank, folder, task, console)
        there = finished(job)
        todo = [u for u in job.own(rank) if not _is_done(there[u])]
        with Shown(console, task, _size(job, todo)) as shown:
            _write_units(job, encoders, there, todo, dropped, folder, check, shown)
        there = finished(job)
        missing = sum(not _is_done(records) for records in there)
        if missing:
            return None, missing
        facts = {"dtype": job.spec.dtype, **job.facts}
        records = [record for unit in there for record in unit]
        manifest = manifest_of(records, **facts)
        if manifest.documents == 0:
            raise InputError(f"no document is left for {job.path}.")
        write_manifest(job.path, manifest)
    remove(f"{job.path}/work")
    return manifest, 0


def _is_done(records: list[Record]) -> bool:
    return bool(records) and records[-1].last


def _size(job: Job, units: list[int]) -> int | None:
    sizes = [job.text.units[unit].bytes for unit in units]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


@contextlib.contextmanager
def _scratch(path: str, rank: Rank) -> Iterator[tuple[str, Any]]:
    """A folder of this rank alone, and what raises once another has taken it over."""
    folder = f"{path}/work/rank-{rank.index}-of-{rank.world}"
    if not is_renamed(path):  # no locks there: parts written twice are the same
        yield folder, lambda: None
        return
    lost: list[str] = []
    lock = RunLock(epath.Path(folder), lost.append)
    try:
        lock.take()
    except InputError as error:
        raise InputError(
            f"{error} (Here it is a `prepare` of the same rank, and the store is "
            f"{path}.)"
        ) from error

    def check() -> None:
        if lost:
            raise StorageError(lost[0])

    try:
        for name in os.listdir(folder):  # what a killed one has left
            if not name.startswith("lock.json"):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        yield folder, check
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (f"{path}/work", path):
            with contextlib.suppress(OSError):
                os.rmdir(empty)


def _dropped(
    job: Job, rank: Rank, folder: str, task: str, console: Console
) -> dict[int, np.ndarray]:
    if not job.text.config.drop_duplicates:
        return {}
    own = job.own(rank)
    with Shown(console, f"{task}: hashes", _size(job, list(own))) as shown:
        for unit in own:
            write_hashes(job.path, job.text, unit, job.origin, folder, shown.read)
    return find_duplicates(job.path, len(job.text.units), own, console)


# --- Parts ----------------------------------------------------------------------------

Label = tuple[int, Batch]  # unit and what is known of the batch


def _write_units(
    job: Job,
    encoders: "Encoders[Label]",
    there: list[list[Record]],
    todo: list[int],
    dropped: dict[int, np.ndarray],
    folder: str,
    check: Any,
    shown: Shown,
) -> None:
    """Makes the missing parts of some units; tokenizing runs on from unit to unit."""
    writer: _UnitWriter | None = None
    tokenized = encoders.map(_labelled(job, there, todo, dropped))
    try:
        for (unit, batch), found in tokenized:
            if writer is None:
                writer = _UnitWriter(job, unit, there[unit], folder, check)
            if writer.add(batch, found):
                writer = None
                if job.most != Most():
                    break  # the only unit; what was read ahead is too much
            shown.add(len(batch.rows), found.tokens.size, batch.given.characters)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise


def _labelled(
    job: Job,
    there: list[list[Record]],
    todo: list[int],
    dropped: dict[int, np.ndarray],
) -> Iterator[tuple[Label, Texts]]:
    mark = job.text.config.invalid_utf8 == "replace"
    for unit in todo:
        start = there[unit][-1].rows if there[unit] else 0
        documents = job.text.read(job.text.units[unit], start)
        for batch in batches(documents, dropped.get(unit, _NOTHING), mark=mark):
            yield (unit, batch), batch.given


class _UnitWriter:
    """Cuts what comes of a unit into parts, each behind the document that fills it."""

    def __init__(
        self, job: Job, unit: int, there: list[Record], folder: str, check: Any
    ):
        self._job, self._unit, self._part = job, unit, len(there)
        self._folder, self._check = folder, check
        # Of the documents that are added: rows up to their end, counts since the unit
        # was opened, and those of them that are in a finished part; how many there are.
        self._rows = there[-1].rows if there else 0
        self._counts = self._finished = Counts()
        self._documents = sum(record.documents for record in there)
        self._tokens = sum(record.tokens for record in there)
        self._piece = 0  # tokens of a document that has not ended
        self._writer: PartWriter | None = None

    def add(self, batch: Batch, found: Tokens) -> bool:
        """Adds a batch; True: the unit is done."""
        if batch.last:
            self._counts = batch.total
            self._finish(last=True)
            return True
        lengths, ends = self._ended(batch, found)
        kept, is_full = self._within(lengths)
        first = start = 0
        while first < kept:
            room = PART_TOKENS - self._open().tokens
            stop = first + 1 + int(np.searchsorted(ends[first:kept] - start, room))
            fills, stop = stop <= kept, min(stop, kept)
            end = int(ends[stop - 1])
            self._open().append(found.tokens[start:end], lengths[first:stop])
            self._rows = batch.rows[stop - 1]
            self._counts = Counts(*batch.counts[stop - 1])
            if fills:
                self._finish(last=False)
            first, start = stop, end
        self._documents += kept
        self._tokens += int(lengths[:kept].sum())
        if is_full:
            self._finish(last=True)
        elif not batch.ends:
            self._open().append(found.tokens, lengths)
        return is_full

    def discard(self) -> None:
        """Removes the part under way."""
        if self._writer is not None:
            self._writer.discard()

    def _ended(self, batch: Batch, found: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """Of documents that end in a batch: their tokens, and where in it they end."""
        if batch.begins and batch.ends:
            return found.lengths, np.cumsum(found.lengths)
        self._piece = found.tokens.size + (0 if batch.begins else self._piece)
        ending = [self._piece, found.tokens.size] if batch.ends else []
        both = np.array(ending, np.int64).reshape(2, -1)
        return both[0], both[1]

    def _within(self, lengths: np.ndarray) -> tuple[int, bool]:
        """How many documents the limits let in; True: no more of the following."""
        kept, is_full = lengths.size, False
        most = self._job.most
        if most.documents is not None:
            kept = min(kept, max(0, most.documents - self._documents))
            is_full = self._documents + kept >= most.documents
        if most.tokens is not None:
            tokens = np.cumsum([self._tokens, *lengths[:kept]])
            until = int(np.searchsorted(tokens, most.tokens))
            is_full = is_full or until < tokens.size
            kept = min(kept, until)
        return kept, is_full

    def _open(self) -> PartWriter:
        if self._writer is None:
            name = f"{part_name(self._unit, self._part).replace('/', '-')}"
            self._writer = PartWriter(
                self._job.path, self._unit, self._part, np.dtype(self._job.spec.dtype),
                scratch=f"{self._folder}/{name}.{uuid4().hex[:8]}",
            )  # fmt: skip
        return self._writer

    def _finish(self, *, last: bool) -> None:
        writer, unit = self._open(), self._job.text.units[self._unit]
        self._check()
        writer.finish(
            last=last,
            rows=self._rows,
            name=unit.name,
            fingerprint=unit.fingerprint,
            origin=self._job.origin,
            counts=self._counts - self._finished,
        )
        self._part, self._finished, self._writer = self._part + 1, self._counts, None
