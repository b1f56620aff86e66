# SPDX-License-Identifier: Apache-2.0
"""The parts of a token store: each is a folder that is whole or not there at all.

    parts/00003-00001/   the second part of the corpus's fourth unit
      tokens/            [tokens], the smallest unsigned integer of the vocabulary
      offsets/           [documents + 1] int64, counted from the part's first token
      part.json          its record

A document is in one part; which documents a part holds depends on the text, the
tokenizer and the size of parts alone, never on who wrote it, or how often it was tried.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm_scale.data.arrays import CHUNK_TOKENS, SHARD_TOKENS, Appender
from lm_scale.data.places import commit, is_renamed, read_many, remove, write_bytes
from lm_scale.errors import InputError

RECORD = "part.json"


@dataclass(frozen=True)
class Counts:
    """What became of the rows behind some documents."""

    empty: int = 0  # rows without text: none, or white space only
    duplicates: int = 0  # documents dropped, as an earlier one has the same text
    cut: int = 0  # documents encoded in pieces, as they are very long
    replaced: int = 0  # documents that hold U+FFFD, where bytes were no UTF-8

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*np.add(_values(self), _values(other)).tolist())

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*np.subtract(_values(self), _values(other)).tolist())


def _values(counts: Counts) -> list[int]:
    return list(asdict(counts).values())


@dataclass(frozen=True)
class Record:
    """What a finished part holds, and where the next one of its unit begins."""

    unit: int  # number of the unit in the corpus
    part: int  # number of the part in the unit
    last: bool  # with it the unit ends
    rows: int  # of the unit, up to the end of this part
    tokens: int
    documents: int
    sha256_tokens: str
    sha256_offsets: str
    name: str = ""  # of the unit: what a person finds the text by
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of the unit's text
    origin: dict[str, Any] = field(default_factory=dict)  # what all parts share
    counts: Counts = Counts()


def part_name(unit: int, part: int) -> str:
    """The part's folder in the store."""
    return f"parts/{unit:05d}-{part:05d}"


class PartWriter:
    """Writes one part front to back; memory stays flat.

    store: the store's folder or url. scratch: a folder on the same disk where the part
    is made; None, or where nothing is renamed: in its place.
    """

    def __init__(
        self,
        store: str | Path,
        unit: int,
        part: int,
        dtype: np.dtype,
        *,
        scratch: str | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        shard_tokens: int = SHARD_TOKENS,
    ):
        self._unit, self._part = unit, part
        self._place = f"{str(store).rstrip('/')}/{part_name(unit, part)}"
        self._path = scratch if scratch and is_renamed(store) else self._place
        self._tokens = Appender(
            f"{self._path}/tokens", dtype, chunk_tokens, shard_tokens
        )
        # Documents are rarer than tokens and 8 bytes each: shards of like size.
        shards = shard_tokens // chunk_tokens
        chunk = max(1, chunk_tokens // 8)
        self._offsets = Appender(
            f"{self._path}/offsets", np.dtype(np.int64), chunk, chunk * shards
        )
        self._offsets.append(np.zeros(1, np.int64))
        self._end = 0  # of the last document

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._tokens.size

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self._offsets.size - 1

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds tokens [n] and, for the documents that end in them, lengths [d].

        Raises:
          StorageError: they cannot be written.
        """
        self._tokens.append(tokens)
        ends = self._end + np.cumsum(lengths, dtype=np.int64)
        self._offsets.append(ends)
        self._end = int(ends[-1]) if ends.size else self._end

    def finish(self, **facts: Any) -> Record:
        """Makes the part whole; facts: the fields of Record that it cannot know."""
        record = Record(
            unit=self._unit,
            part=self._part,
            sha256_tokens=self._tokens.finish(),
            sha256_offsets=self._offsets.finish(),
            tokens=self.tokens,
            documents=self.documents,
            **facts,
        )
        content = json.dumps(asdict(record), indent=2).encode()
        write_bytes(self._path, RECORD, content)
        if self._path != self._place:
            commit(self._path, self._place)
        return record

    def discard(self) -> None:
        """Removes what was written of an unfinished part."""
        remove(self._path)


def read_records(store: str | Path, units: range) -> list[list[Record]]:
    """The records of the finished parts of each unit, in order; read concurrently.

    Raises:
      InputError: a record is broken, or the place cannot be read.
    """
    found: list[list[Record]] = [[] for _ in units]
    waiting = list(range(len(units)))
    while waiting:
        names = [part_name(units[i], len(found[i])) for i in waiting]
        contents = read_many(store, [f"{name}/{RECORD}" for name in names])
        following = []
        for i, name, content in zip(waiting, names, contents, strict=True):
            if content is not None:
                found[i].append(_parse(content, f"{store}/{name}"))
                if not found[i][-1].last:
                    following.append(i)
        waiting = following
    return found


def _parse(content: bytes, path: str) -> Record:
    try:
        fields = json.loads(content)
        return Record(**{**fields, "counts": Counts(**fields["counts"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the {RECORD} in {path} is broken ({error}); delete that folder and run "
            "`prepare` again, which makes it anew."
        ) from error
