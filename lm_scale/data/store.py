# SPDX-License-Identifier: Apache-2.0
"""The token store: documents as integers, read from any place at any time.

A store is a folder, local or of an object store:

    tokens/        [tokens], the smallest unsigned integer that holds the vocabulary
    offsets/       [documents + 1] int64; document i is tokens[offsets[i]:offsets[i+1]]
    manifest.json  what is in it; written last, so a store without it is incomplete

The arrays are zarr3 with sharding: a file (shard) holds many chunks, each compressed,
checksummed and read by itself.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lm_scale.errors import InputError, one_line

FORMAT = 1  # of the folder; a reader refuses any other
# 16 Ki: the least that a read decompresses. Random blocks of 128 and 512 tokens read
# twice as fast as from 64 Ki, and the store is no larger (4 Ki: 3 % larger).
CHUNK_TOKENS = 1 << 14
SHARD_TOKENS = 1 << 24  # 16 Mi: the tokens of a file, and of the writer's buffer
CACHE_BYTES = 256 << 20  # of decompressed chunks, for each open store

_MANIFEST = "manifest.json"


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
    sha256: str | None = None  # of it all, see StoreWriter.finish; None: an old one
    format: int = FORMAT


class StoreWriter:
    """Writes a store front to back, one shard at a time; memory stays flat.

        with StoreWriter(path, vocab_size=50_257) as writer:
            writer.append(documents)
            writer.finish(tokenizer_hash=..., separator=..., source=...)

    Leaving without `finish` leaves an incomplete store, which the next writer replaces.

    Raises:
      InputError: a complete store is there already, or the path cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        chunk_tokens: int = CHUNK_TOKENS,
        shard_tokens: int = SHARD_TOKENS,
    ):
        if read_manifest(path) is not None:
            raise InputError(
                f"{path} already holds a complete token store; delete it or choose "
                "another folder."
            )
        self._path = path
        self._vocab_size = vocab_size
        self._dtype = np.min_scalar_type(vocab_size - 1)
        url = _url(path)
        self._tokens = _Appender(
            url + "tokens/", self._dtype, chunk_tokens, shard_tokens
        )
        # Documents are rarer than tokens and 8 bytes each: shards of like size.
        shards = shard_tokens // chunk_tokens
        chunk = max(1, chunk_tokens // 8)
        self._offsets = _Appender(
            url + "offsets/", np.dtype(np.int64), chunk, chunk * shards
        )
        self._offsets.append(np.zeros(1, np.int64))

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception) -> None:
        """Nothing to release: without a manifest the folder is known as incomplete."""

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._tokens.size

    def append(self, documents: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Adds documents, each a sequence of token ids.

        Raises:
          ValueError: an id is negative or not less than vocab_size.
        """
        if not documents:
            return
        arrays = [np.asarray(document, np.int64) for document in documents]
        tokens = np.concatenate(arrays)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()} in a store for a "
                f"vocabulary of {self._vocab_size}"
            )
        ends = self._tokens.size + np.cumsum([array.size for array in arrays])
        self._tokens.append(tokens)
        self._offsets.append(ends)

    def finish(
        self, *, tokenizer_hash: str, separator: int | None, source: dict[str, Any]
    ) -> Manifest:
        """Writes what is buffered and then the manifest, which completes the store.

        Its sha256 is that of the sha256 of the tokens' bytes and of the offsets'.
        """
        self._tokens.flush()
        self._offsets.flush()
        digests = self._tokens.sha256.digest() + self._offsets.sha256.digest()
        manifest = Manifest(
            tokens=self._tokens.size,
            documents=self._offsets.size - 1,
            dtype=self._dtype.name,
            vocab_size=self._vocab_size,
            tokenizer_hash=tokenizer_hash,
            separator=separator,
            source=source,
            sha256=hashlib.sha256(digests).hexdigest(),
        )
        content = json.dumps(asdict(manifest), indent=2)
        kvstore = ts.KvStore.open(_url(self._path)).result()
        kvstore.write(_MANIFEST, content.encode()).result()
        return manifest


class TokenStore:
    """Random access to a complete store. Safe to share among threads; pickles by path.

    Open one with `TokenStore.open(path)`.
    """

    def __init__(self, path: str | Path, manifest: Manifest, tokens, offsets):
        self.path = path
        self.manifest = manifest
        self._tokens = tokens
        self._offsets = offsets

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Opens the store in a local folder or at a url (gs://, s3://).

        Raises:
          InputError: there is no store, it is incomplete, or of another format.
        """
        manifest = read_manifest(path)
        if manifest is None:
            raise InputError(
                f"{path} holds no complete token store (no {_MANIFEST}): the path is "
                "wrong, or writing it was cut short; run `prepare` for it."
            )
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        tokens = _open_array(path, "tokens", manifest.tokens, context)
        offsets = _open_array(path, "offsets", manifest.documents + 1, context)
        return cls(path, manifest, tokens, offsets)

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
          InputError: a shard is gone or damaged, or holds what is no token.
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
        for row, tokens in zip(blocks, self._read(self._tokens, spans), strict=True):
            row[:] = tokens
        return self._checked(blocks)

    def documents(self, indices: np.ndarray) -> list[np.ndarray]:
        """The tokens of these documents (counted from 0), int32, read concurrently.

        Raises:
          IndexError: there is no such document.
          InputError: as `read_blocks`.
        """
        found = self._read(self._tokens, self._spans(indices))
        return [self._checked(tokens.astype(np.int32)) for tokens in found]

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Which token of the store each of these documents begins with, int64 [n]."""
        return self._spans(indices)[:, 0]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Number of tokens of these documents, int64 [n]."""
        spans = self._spans(indices)
        return spans[:, 1] - spans[:, 0]

    def _spans(self, indices: np.ndarray) -> np.ndarray:
        """First and last + 1 token of each document, int64 [n 2]."""
        indices, last = np.asarray(indices), self.num_documents - 1
        if indices.size and not 0 <= indices.min() <= indices.max() <= last:
            raise IndexError(
                f"documents {indices.min()} to {indices.max()} of {self.num_documents}"
            )
        found = self._read(self._offsets, np.stack([indices, indices + 2], axis=1))
        spans = np.array(found, np.int64).reshape(-1, 2)
        if np.any(spans[:, 0] < 0) or np.any(np.diff(spans) < 0):
            raise self._damaged("offsets/ holds documents that end before they begin")
        if spans.size and spans.max() > self.num_tokens:
            raise self._damaged("offsets/ holds documents behind the last token")
        return spans

    def _read(self, array, spans: np.ndarray) -> list[np.ndarray]:
        """The values from the first to before the second place of each span [n 2]."""
        joined, runs, firsts, lasts = _joined(spans)
        # One batch: spans of one shard share a file read, and all run concurrently.
        with ts.Batch() as batch:
            reads = [array[a:b].read(batch=batch) for a, b in joined.tolist()]
        try:
            found = [read.result() for read in reads]
        except (OSError, ValueError, RuntimeError) as error:
            raise self._damaged(one_line(error)) from error
        within = zip(runs, firsts, lasts, strict=True)
        return [found[run][a:b] for run, a, b in within]

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The same tokens. An embedding would take the last row for those too high."""
        size = self.manifest.vocab_size
        if tokens.size and tokens.max() >= size:
            raise self._damaged(f"token {tokens.max()} in a vocabulary of {size}")
        return tokens

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"the token store {self.path} is damaged: {what}. Put a whole copy there, "
            "or delete it and run `prepare` again."
        )


def _joined(spans: np.ndarray):
    """Spans [n 2] that overlap or touch, as one: a read costs some 20 µs, any length.

    The joined ones [m 2]; and of each span which of them it is in, and its two places
    there, as lists.
    """
    spans = spans.reshape(-1, 2)
    order = np.argsort(spans[:, 0], kind="stable")
    starts, stops = spans[order].T
    reach = np.maximum.accumulate(stops)  # the last place that was read so far
    new = np.ones(starts.size, bool)
    new[1:] = starts[1:] > reach[:-1]
    begins = np.flatnonzero(new)
    ends = np.append(begins[1:], starts.size) - 1 if starts.size else begins
    joined = np.stack([starts[begins], reach[ends]], axis=1)
    run = np.empty(starts.size, np.int64)
    run[order] = np.cumsum(new) - 1
    inside = spans - joined[run, :1]
    return joined, run.tolist(), *inside.T.tolist()


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of the store at a path; None: there is no complete store.

    Raises:
      InputError: the place cannot be read, or the manifest is broken or of another
        format.
    """
    try:
        found = ts.KvStore.open(_url(path)).result().read(_MANIFEST).result()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if found.state == "missing":
        return None
    try:
        fields = json.loads(found.value)
        version = fields["format"]
        if version == FORMAT:
            return Manifest(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the {_MANIFEST} in {path} is broken ({error}); delete the store and run "
            "`prepare` again."
        ) from error
    raise InputError(
        f"the token store {path} has format {version}; this version of lm_scale reads "
        f"format {FORMAT}: run `prepare` again into another folder."
    )


def _url(path: str | Path) -> str:
    """The kvstore url of a folder, local or already a url, with a slash at the end."""
    text = str(path)
    if "://" not in text:
        text = Path(os.path.abspath(os.path.expanduser(text))).as_uri()
    return text.rstrip("/") + "/"


def _open_array(path: str | Path, name: str, size: int, context: ts.Context):
    spec = {
        "driver": "zarr3",
        "kvstore": f"{_url(path)}{name}/",
        # A complete store never changes: do not ask the file system at each read.
        "recheck_cached_data": False,
        "fill_missing_data_reads": False,  # a shard that is gone is no row of zeros
    }
    try:
        array = ts.open(spec, read=True, open=True, context=context).result()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the token store {path} is damaged: {error}") from error
    if array.shape != (size,):
        raise InputError(
            f"the token store {path} is damaged: {name} has {array.shape[0]} entries "
            f"and the manifest says {size}; run `prepare` again."
        )
    return array


class _Appender:
    """A growing 1-D zarr3 array: whole shards go out as soon as they are full."""

    def __init__(self, url: str, dtype: np.dtype, chunk: int, shard: int):
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
        spec = {
            "driver": "zarr3", "kvstore": url, "metadata": metadata,
            "store_data_equal_to_fill_value": True,  # what is missing is an error
        }  # fmt: skip
        try:
            self._array = ts.open(spec, create=True, delete_existing=True).result()
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot write {url}: {error}") from error
        self._buffer = np.empty(shard, dtype)
        self.sha256 = hashlib.sha256()  # of what is written
        self._written = 0
        self._filled = 0

    @property
    def size(self) -> int:
        return self._written + self._filled

    def append(self, values: np.ndarray) -> None:
        while values.size:
            room = self._buffer.size - self._filled
            part, values = values[:room], values[room:]
            self._buffer[self._filled : self._filled + part.size] = part
            self._filled += part.size
            if self._filled == self._buffer.size:
                self.flush()

    def flush(self) -> None:
        """Writes the buffer; the array grows first, so it is never read back."""
        array = self._array.resize(exclusive_max=[self.size]).result()
        full = self._buffer[: self._filled]
        array[self._written :].write(full).result()
        self.sha256.update(full.tobytes())
        self._written, self._filled = self.size, 0
