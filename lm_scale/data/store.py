# SPDX-License-Identifier: Apache-2.0
"""The token store: documents as integers, read from any place at any time.

A store is a folder, local or of an object store:

    parts/00000-00000/  tokens/ and offsets/ of some documents, see data/parts.py
    manifest.json       what is in it; written last, so a store without it is incomplete

The parts, in the manifest's order, are one row of tokens, and their documents one row
of documents: a reader sees no parts. They are opened when something in them is first
read, for a large store has thousands.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lm_scale.data.arrays import reading
from lm_scale.data.parts import Counts, Record, part_name
from lm_scale.data.places import ERRORS, context, read_bytes, write_bytes
from lm_scale.data.ragged import count_up
from lm_scale.errors import InputError, one_line

FORMAT = 2  # of the folder; a reader refuses any other
# Of decompressed chunks, for each open store: of offsets, above all. Tokens stay in
# memory in another form (token_cache.py).
CACHE_BYTES = 64 << 20
MANIFEST = "manifest.json"
# Where the documents asked for are so many of a range, the range is read at once.
_DENSE = 16


@dataclass(frozen=True)
class PartEntry:
    """A part, as the manifest lists it."""

    name: str  # its folder in the store
    tokens: int
    documents: int
    sha256_tokens: str
    sha256_offsets: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds and where it came from."""

    tokens: int
    documents: int
    dtype: str  # of tokens/
    vocab_size: int  # every token is less than this
    tokenizer_hash: str  # of the tokenizer that wrote it, see tokenizer_hash()
    separator: int | None  # token that ends each document; None: none was added
    source: dict[str, Any]  # the corpus config and the part of it
    sha256: str  # of the hashes of all parts: of all tokens and offsets
    counts: dict[str, int] = field(default_factory=dict)  # of Counts, over all parts
    parts: tuple[PartEntry, ...] = ()
    format: int = FORMAT


def manifest_of(records: Sequence[Record], **facts: Any) -> Manifest:
    """The manifest of a store of these parts; facts: where it came from."""
    names = [part_name(record.unit, record.part) for record in records]
    entries = tuple(
        PartEntry(
            name, record.tokens, record.documents,
            record.sha256_tokens, record.sha256_offsets,
        )
        for name, record in zip(names, records, strict=True)
    )  # fmt: skip
    total = hashlib.sha256()
    for entry in entries:
        total.update(bytes.fromhex(entry.sha256_tokens + entry.sha256_offsets))
    return Manifest(
        tokens=sum(entry.tokens for entry in entries),
        documents=sum(entry.documents for entry in entries),
        sha256=total.hexdigest(),
        counts=asdict(sum((record.counts for record in records), Counts())),
        parts=entries,
        **facts,
    )


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """Completes a store whose parts are there; StorageError if it cannot."""
    fields = asdict(manifest)
    content = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1)
    write_bytes(path, MANIFEST, content.encode())


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds the vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


class TokenStore:
    """Random access to a complete store. Safe to share among threads; pickles by path.

    Open one with `TokenStore.open(path)`.
    """

    def __init__(self, path: str | Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        parts = manifest.parts
        # Where each part begins in the row of all tokens, of all documents; the end.
        self._first_tokens = np.cumsum([0, *(part.tokens for part in parts)])
        self._first_documents = np.cumsum([0, *(part.documents for part in parts)])
        self._context = context(CACHE_BYTES)
        self._arrays: dict[tuple[str, int], ts.TensorStore] = {}

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Opens the store in a local folder or at a url (gs://, s3://).

        Raises:
          InputError: there is no store, it is incomplete, its manifest is damaged, or
            of another format.
        """
        manifest = read_manifest(path)
        if manifest is None:
            raise InputError(
                f"{path} holds no complete token store (no {MANIFEST}): the path is "
                "wrong, or writing it was cut short; run `prepare` for it."
            )
        return cls(path, manifest)

    def __reduce__(self):
        return type(self).open, (self.path,)

    @property
    def num_tokens(self) -> int:
        return self.manifest.tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start ... start + length - 1 as int32 [length]."""
        return self.read_blocks(np.array([start]), length)[0]

    def read_blocks(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Blocks of `length` tokens that begin at `starts` [n], as int32 [n, length].

        Raises:
          IndexError: a block begins before the first token or ends after the last.
          InputError: a part is gone or damaged, or holds what is no token.
        """
        starts = np.asarray(starts)
        last = self.num_tokens - length
        if starts.size and not 0 <= starts.min() <= starts.max() <= last:
            raise IndexError(
                f"blocks of {length} tokens from {starts.min()} to {starts.max()} in a "
                f"store of {self.num_tokens} tokens"
            )
        blocks = np.empty((starts.size, length), np.int32)
        spans = np.stack([starts, starts + length], axis=1)
        rows, parts, within = _pieces(spans, self._first_tokens)
        places = np.zeros(rows.size, np.int64)  # of each piece in its row
        sizes = np.cumsum(within[:, 1] - within[:, 0])
        places[1:] = sizes[:-1] - length * rows[1:]
        found = self._read("tokens", parts, within)
        for row, place, tokens in zip(rows, places, found, strict=True):
            blocks[row, place : place + tokens.size] = tokens
        return self._checked(blocks)

    def lengths(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Number of tokens of these documents, int64 [n]; as `spans`."""
        spans = self.spans(indices)
        return spans[:, 1] - spans[:, 0]

    def spans(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The first and last + 1 token of these documents (from 0), int64 [n 2].

        Of a range of documents: one read a part.

        Raises:
          IndexError: there is no such document.
          InputError: as `read_blocks`.
        """
        indices, last = np.asarray(indices, np.int64), self.num_documents - 1
        if indices.size and not 0 <= indices.min() <= indices.max() <= last:
            raise IndexError(
                f"documents {indices.min()} to {indices.max()} of {self.num_documents}"
            )
        parts = _part_of(indices, self._first_documents)
        within = indices - self._first_documents[parts]
        spans = np.empty((indices.size, 2), np.int64)
        for part, some in _groups(parts):
            spans[some] = self._offsets(part, within[some])
        if np.any(spans[:, 0] < 0) or np.any(np.diff(spans) < 0):
            raise self._damaged("offsets/ holds documents that end before they begin")
        sizes = np.diff(self._first_tokens)[parts]
        if np.any(spans[:, 1] > sizes):
            raise self._damaged("offsets/ holds documents behind the last token")
        return spans + self._first_tokens[parts][:, None]

    def _offsets(self, part: int, documents: np.ndarray) -> np.ndarray:
        """Both ends of these documents of a part, int64 [n 2]."""
        low, high = int(documents.min()), int(documents.max())
        if high - low > _DENSE * documents.size:
            ends = np.stack([documents, documents + 2], axis=1)
            return np.array(self._read("offsets", np.full(len(ends), part), ends))
        (every,) = self._read("offsets", np.array([part]), np.array([[low, high + 2]]))
        return np.stack([every[documents - low], every[documents - low + 1]], axis=1)

    def _read(self, name: str, parts: np.ndarray, spans: np.ndarray) -> list[Any]:
        """The values of each span [n 2] of its part [n]."""
        arrays = self._open(name, parts)
        # One batch: spans of one shard share a file read, and all run concurrently.
        with ts.Batch() as batch:
            reads = [
                arrays[part][start:stop].read(batch=batch)
                for part, (start, stop) in zip(
                    parts.tolist(), spans.tolist(), strict=True
                )
            ]
        try:
            return [read.result() for read in reads]
        except ERRORS as error:
            raise self._damaged(one_line(error)) from error

    def _open(self, name: str, parts: np.ndarray) -> dict[int, Any]:
        """The open arrays of these parts; those not open yet are, all at once."""
        wanted = set(parts.tolist())
        opening = {
            part: ts.open(
                reading(f"{str(self.path).rstrip('/')}/{self._entry(part).name}/{name}"),
                read=True, open=True, context=self._context,
            )
            for part in wanted
            if (name, part) not in self._arrays
        }  # fmt: skip
        for part, opened in opening.items():
            try:
                array = opened.result()
            except ERRORS as error:
                raise self._damaged(one_line(error)) from error
            entry = self._entry(part)
            size = entry.tokens if name == "tokens" else entry.documents + 1
            if array.shape != (size,):
                raise self._damaged(
                    f"{entry.name}/{name} has {array.shape[0]} entries and the "
                    f"manifest says {size}"
                )
            self._arrays[name, part] = array
        return {part: self._arrays[name, part] for part in wanted}

    def _entry(self, part: int) -> PartEntry:
        return self.manifest.parts[part]

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The same tokens. An embedding would take the last row for those too high."""
        size = self.manifest.vocab_size
        if tokens.size and tokens.max() >= size:
            raise self._damaged(f"token {tokens.max()} in a vocabulary of {size}")
        return tokens

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"the token store {self.path} is damaged: {what}. `lm-scale prepare "
            "--verify` tells all that is; put a whole copy there, or delete the store "
            "and run `prepare` again."
        )


def _part_of(places: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """The part that holds each place, by where the parts begin, [n]."""
    return np.searchsorted(firsts, places, side="right") - 1


def _pieces(
    spans: np.ndarray, firsts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spans [n 2] cut where parts begin: row [m], part [m] and span in it [m 2].

    Pieces come in order; those of no token are left out.
    """
    starts, stops = spans[:, 0], spans[:, 1]
    low, high = _part_of(starts, firsts), _part_of(stops - 1, firsts)
    counts = np.where(stops > starts, high - low + 1, 0)
    rows = np.repeat(np.arange(len(spans)), counts)
    parts = low[rows] + count_up(counts)
    first, end = firsts[parts], firsts[parts + 1]
    within = np.stack(
        [np.maximum(starts[rows], first) - first, np.minimum(stops[rows], end) - first],
        axis=1,
    )
    kept = within[:, 1] > within[:, 0]
    return rows[kept], parts[kept], within[kept]


def _groups(parts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each part that is named, and where it is, [n]."""
    order = np.argsort(parts, kind="stable")
    names, firsts = np.unique(parts[order], return_index=True)
    return list(zip(names.tolist(), np.split(order, firsts[1:]), strict=True))


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of the store at a path; None: there is no complete store.

    Raises:
      InputError: the place cannot be read, or the manifest is broken or of another
        format.
    """
    content = read_bytes(path, MANIFEST)
    if content is None:
        return None
    try:
        fields = json.loads(content)
        version = fields["format"]
        if version == FORMAT:
            checksum = fields.pop("checksum")
            if _checksum(fields) != checksum:
                raise ValueError("its content does not fit its checksum")
            entries = tuple(PartEntry(**entry) for entry in fields["parts"])
            return replace(Manifest(**fields), parts=entries)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the {MANIFEST} in {path} is broken ({error}); put a whole copy there, or "
            "delete it and run `prepare` again, which writes it anew."
        ) from error
    raise InputError(
        f"the token store {path} has format {version}; this version of lm_scale reads "
        f"format {FORMAT}: run `prepare` again into another folder."
    )
