# SPDX-License-Identifier: Apache-2.0
"""Token stores of documents that a test has at hand, written and read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_scale.data.arrays import CHUNK_TOKENS, SHARD_TOKENS
from lm_scale.data.parts import PartWriter
from lm_scale.data.store import (
    Manifest,
    TokenStore,
    manifest_of,
    token_type,
    write_manifest,
)


def write_store(
    path: str | Path,
    *parts: Sequence[np.ndarray | Sequence[int]],
    vocab_size: int,
    chunk_tokens: int = CHUNK_TOKENS,
    shard_tokens: int = SHARD_TOKENS,
    tokenizer_hash: str = "",
    separator: int | None = None,
    source: dict[str, Any] | None = None,
) -> Manifest:
    """A store of these documents: a list of them for each of its parts."""
    dtype, records = token_type(vocab_size), []
    for unit, documents in enumerate(parts):
        writer = PartWriter(
            path, unit, 0, dtype, chunk_tokens=chunk_tokens, shard_tokens=shard_tokens
        )
        for document in documents:
            tokens = np.asarray(document, dtype)
            writer.append(tokens, np.array([tokens.size]))
        records.append(writer.finish(last=True, rows=writer.documents))
    manifest = manifest_of(
        records, dtype=dtype.name, vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash, separator=separator, source=source or {},
    )  # fmt: skip
    write_manifest(path, manifest)
    return manifest


def read_documents(store: TokenStore, numbers: Sequence[int] | np.ndarray) -> list:
    """The tokens of these documents, int32 [n] each."""
    return [store.read(first, last - first) for first, last in store.spans(numbers)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
