# SPDX-License-Identifier: Apache-2.0
"""What a token store holds, for a person to look at before training on it."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from lm_scale.console import say
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.shown import text_of
from lm_scale.data.store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 1 << 16  # documents whose lengths are in memory
_SAMPLE = 100  # tokens of a document that are shown
_BAR = 30  # characters of the longest bar
_SEED = 0  # of the random samples: the same at each call


@dataclass(frozen=True)
class Lengths:
    """How many documents have which length.

    Different lengths add up to the tokens at least, so there are few of them: 1.4
    million at most in a store of 10^12 tokens.
    """

    tokens: np.ndarray  # int64 [n], ascending: the lengths that occur
    documents: np.ndarray  # int64 [n]: how many have it
    longest: int  # number of the first document of the greatest length; -1: none

    @property
    def median(self) -> float:
        """As of all lengths in a row: the middle one, or the mean of the middle two."""
        ends = np.cumsum(self.documents)
        middle = [(ends[-1] - 1) // 2, ends[-1] // 2]
        return float(self.tokens[np.searchsorted(ends, middle, side="right")].mean())

    def above(self, length: int) -> tuple[int, int]:
        """Documents longer than this, and the tokens in them."""
        longer = self.tokens > length
        documents = self.documents[longer]
        return int(documents.sum()), int((documents * self.tokens[longer]).sum())

    def histogram(self) -> list[tuple[int, int, int, int]]:
        """(shortest, longest, documents, tokens) of lengths 0, 1, 2-3, 4-7, ...

        Only of bins with documents, from the first such to the last.
        """
        bins = np.frexp(self.tokens)[1]  # 0 for 0, else 1 + the binary logarithm
        rows = []
        for number in range(int(bins.min()), int(bins.max()) + 1):
            here = bins == number
            documents = int(self.documents[here].sum())
            tokens = int((self.documents[here] * self.tokens[here]).sum())
            low = 1 << number >> 1
            rows.append((low, max(low, (1 << number) - 1), documents, tokens))
        return rows


def measure(store: TokenStore, at_once: int = _AT_ONCE) -> Lengths:
    """The lengths of all documents; reads so many at once, whatever the store's size.

    Raises InputError if the store is damaged.
    """
    tokens, documents = np.empty(0, np.int64), np.empty(0, np.int64)
    most, longest = -1, -1
    for first in range(0, store.num_documents, at_once):
        stop = min(first + at_once, store.num_documents)
        lengths = store.lengths(np.arange(first, stop))
        if lengths.max() > most:
            longest = first + int(lengths.argmax())
            most = int(lengths.max())
        new, counts = np.unique(lengths, return_counts=True)
        tokens, place = np.unique(np.concatenate([tokens, new]), return_inverse=True)
        counts = np.concatenate([documents, counts])
        documents = np.zeros(tokens.size, np.int64)
        np.add.at(documents, place, counts)
    return Lengths(tokens, documents, longest)


def inspect(
    store: TokenStore,
    tokenizer: "PreTrainedTokenizerFast | None",
    seq_len: int | None,
    console: Console,
) -> None:
    """Prints what the store holds: counts, origin, lengths, some documents.

    tokenizer: the store's (None: documents are shown as numbers). seq_len: of the
    sequences to be trained on, in tokens (None: not known).
    """
    lengths = measure(store)
    manifest = store.manifest
    counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    say(console, f"{store.path}: {counts}")
    for name, text in _origin(store, tokenizer).items():
        say(console, f"  {name:<10} {text}")
    if not store.num_documents:
        return
    mean = store.num_tokens / store.num_documents
    say(
        console,
        f"  {'lengths':<10} shortest {lengths.tokens[0]:,}, median "
        f"{lengths.median:,.1f}, mean {mean:,.1f}, longest {lengths.tokens[-1]:,} "
        f"tokens (document {lengths.longest})",
    )
    if seq_len is not None:
        documents, tokens = lengths.above(seq_len)
        share = tokens / max(1, store.num_tokens)
        say(
            console,
            f"  {'':<10} {documents:,} documents, with {share:.1%} of the tokens, are "
            f"longer than seq_len = {seq_len:,}",
        )
    console.print(_table(lengths, store.num_tokens))
    _samples(store, tokenizer, lengths.longest, console)


def _origin(store: TokenStore, tokenizer) -> dict[str, str]:
    """Where the tokens come from, as the manifest keeps it."""
    manifest = store.manifest
    usual = dataclasses.asdict(CorpusConfig())
    told = {
        name: value
        for name, value in manifest.source.items()
        if name in ("source", "part") or value != usual.get(name)
    }
    end = manifest.separator
    separator = "none: documents follow one another without"
    if end is not None:
        token = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(end)}"
        separator = f"token {end}{token} at the end of each document"
    return {
        "made from": ", ".join(f"{name} {value!r}" for name, value in told.items()),
        "tokenizer": f"{manifest.tokenizer_hash:.12}, vocabulary of "
        f"{manifest.vocab_size:,} tokens ({manifest.dtype})",
        "separator": separator,
    }


def _table(lengths: Lengths, all_tokens: int) -> Table:
    """The histogram; a bar is the documents' number."""
    table = Table(
        Column("tokens", justify="right"), Column("documents", justify="right"),
        Column("of all tokens", justify="right"), Column("", no_wrap=True), box=None,
    )  # fmt: skip
    rows = lengths.histogram()
    most = max(documents for _, _, documents, _ in rows)
    for low, high, documents, tokens in rows:
        table.add_row(
            f"{low:,}" if low == high else f"{low:,}-{high:,}",
            f"{documents:,}", f"{tokens / max(1, all_tokens):.1%}",
            "█" * -(-documents * _BAR // most),
        )  # fmt: skip
    return table


def _samples(store: TokenStore, tokenizer, longest: int, console: Console) -> None:
    """Beginnings of documents: the first, two at random, the longest."""
    drawn = np.random.default_rng(_SEED).integers(0, store.num_documents, 2).tolist()
    names = {"the first": 0, "at random": drawn[0], "at random, too": drawn[1]}
    for name, document in {**names, "the longest": longest}.items():
        ((first, stop),) = store.spans([document]).tolist()
        length = stop - first
        shown = store.read(first, min(length, _SAMPLE))
        more = " ..." if length > _SAMPLE else ""
        say(console, f"document {document}, {name}, {length:,} tokens:")
        say(console, f"  {text_of(tokenizer, shown)}{more}")
