# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: a corpus is a stream of documents in a fixed order.

Three kinds of source: `python-docs`, the English that ships with every CPython (no
network); files and folders, read by `datasets`; and datasets of the Hugging Face hub.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lm_scale.data.python_docs import python_docs
from lm_scale.data.reading import Reading, reason
from lm_scale.data.sources import Rows, open_rows
from lm_scale.errors import InputError

Part = Literal["train", "validation"]
SampleBy = Literal["line", "paragraph", "document"]
Holdout = Literal["hash", "first"]

_BATCH = 1000  # rows taken from Arrow at once


@dataclass(frozen=True)
class CorpusConfig:
    """Which text to train on and which to evaluate on."""

    # "python-docs"; a file, folder, glob or url (hf://, https://) of txt, json, jsonl,
    # csv or parquet; a folder of `save_to_disk`; or the name of a hub dataset.
    source: str = "python-docs"
    subset: str | None = None  # configuration of a hub dataset, subfolder of a folder
    split: str = "train"  # of a hub dataset, or of a folder whose names tell splits
    text_column: str | None = None  # None: "text", else the first column of strings
    sample_by: SampleBy = "line"  # what a document of a .txt file is
    max_documents: int | None = None  # read so many of a source only, the first
    keep_linebreaks: bool = True  # at the ends of the lines of a .txt file
    keep_blank: bool = False  # texts of white space only, such as a .txt's empty lines
    # Evaluate on this (same kinds as source); None: on the validation split of source,
    # if it has one, else on documents held out of it.
    validation_source: str | None = None
    validation_fraction: float = 0.05  # share of documents held out
    # Which documents: "hash", chosen by a hash of their text; "first", the first rows,
    # as the slice train[:5%] of `datasets` takes them.
    holdout: Holdout = "hash"
    # False: the files are read into an Arrow cache on disk first, then memory mapped.
    streaming: bool = True

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction is {self.validation_fraction}; expected a share "
                "of the documents, at least 0 and less than 1."
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(
                f"max_documents is {self.max_documents}; expected a number above 0."
            )
        for name, choices in (("sample_by", SampleBy), ("holdout", Holdout)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise InputError(
                    f"{name} is {value!r}; expected one of "
                    f"{', '.join(get_args(choices))}."
                )
        if self.holdout == "first" and self.streaming and self.source != "python-docs":
            raise InputError(
                "holdout is 'first' and streaming is True, but a stream has no number "
                "of rows to take the first share of; set streaming to False, or "
                "holdout to 'hash'."
            )


def documents(
    config: CorpusConfig,
    part: Part,
    *,
    cache_dir: str | None = None,
    workers: int | None = None,
) -> Iterator[str]:
    """The documents of one part of the corpus, in the same order at every call.

    Validation is `validation_source` if given, else the "validation" split of a hub
    dataset or folder that has one, else the share of the documents that `holdout`
    chooses: by a hash of their text, so that equal documents never straddle the two
    parts, or the first rows, dropped ones counted. Empty documents are dropped, and
    without `keep_blank` those of white space only. Memory does not grow with the
    corpus.

    cache_dir: where downloads and Arrow files go (None: Hugging Face's default).
    workers: processes that read files into Arrow, if not streaming (None: this one).
    Neither changes the documents.

    Raises:
      InputError: at the call for a source that is missing, unreadable or empty; while
        iterating for a row that cannot be read.
    """
    validating = part == "validation"
    separate = config.validation_source is not None
    source = (config.validation_source if validating else None) or config.source
    reading = Reading(
        streaming=config.streaming,
        cache_dir=cache_dir,
        workers=workers,
        text={"sample_by": config.sample_by, "keep_linebreaks": config.keep_linebreaks},
    )
    rows, whole = _rows(config, source, validating, reading)
    if config.max_documents is not None:
        rows = _take(rows, config.max_documents)
    texts = _texts(rows, source, config)
    first = next(texts, None)  # errors surface here, not hours later
    if first is None:
        raise InputError(f"the corpus {source} holds no text; give one that does.")
    texts = itertools.chain([first], texts)
    if separate or whole:
        return texts
    share = config.validation_fraction
    if validating and share == 0:
        return iter(())  # without reading all of a large corpus to find none
    if config.holdout == "first":
        return _texts(_first(rows, share, validating), source, config)
    return (text for text in texts if _held_out(text, share) == validating)


def _rows(
    config: CorpusConfig, source: str, validating: bool, reading: Reading
) -> tuple[Rows, bool]:
    """All rows of a source; True: they are the wanted part, so hold nothing out."""
    if source == "python-docs":
        rows = ({"text": text} for text in python_docs())
        return (list(rows) if config.holdout == "first" else rows), False
    own = source == config.source  # subset and split are no names in another source
    subset, split = (config.subset, config.split) if own else (None, "train")
    return open_rows(source, subset, split, validating=validating, reading=reading)


def _take(rows: Any, most: int) -> Rows:
    if _is_arrow(rows):
        return rows.select(range(min(most, len(rows))))
    return rows[:most] if isinstance(rows, list) else itertools.islice(rows, most)


def _held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def _first(rows: Any, share: float, validating: bool) -> Rows:
    """The first rows or the rest, cut where `datasets` cuts for train[:5%]."""
    percent = round(100 * share, 9)  # 100 * 0.07 is 7.000000000000001
    cut = round(percent * len(rows) / 100)
    kept = range(cut) if validating else range(cut, len(rows))
    return rows.select(kept) if _is_arrow(rows) else [rows[i] for i in kept]


def _is_arrow(rows: Any) -> bool:
    return hasattr(rows, "select")  # a Dataset, whose class takes 2 s to import


def _texts(rows: Rows, source: str, config: CorpusConfig) -> Iterator[str]:
    """The column of text. A null is no document, and an empty string neither."""
    values = _arrow_values if _is_arrow(rows) else _row_values
    try:
        for column, text in values(rows, source, config.text_column):
            if isinstance(text, str):
                if text and (config.keep_blank or not text.isspace()):
                    yield text
            elif text is not None:
                raise InputError(
                    f"column {column!r} of {source} holds {text!r:.40} where a string "
                    "was expected; name a column of text by text_column."
                )
    except InputError:
        raise
    except (OSError, ValueError) as error:  # bad bytes, broken json, a lost connection
        raise InputError(f"cannot read {source}: {reason(error)}") from error


def _row_values(
    rows: Rows, source: str, wanted: str | None
) -> Iterator[tuple[str | None, Any]]:
    """The name and the value of the column, row by row."""
    column = None
    for row in rows:
        if column not in row:  # the first row, or a file that is unlike the first
            column = _column(row, source, column or wanted)
        yield column, row[column]


def _arrow_values(
    rows: Any, source: str, wanted: str | None
) -> Iterator[tuple[str | None, Any]]:
    """The same, without making a dict of every row."""
    if len(rows) == 0:
        return
    column = _column(rows[0], source, wanted)
    for table in rows.select_columns(column).with_format("arrow").iter(_BATCH):
        for value in table[column].to_pylist():
            yield column, value


def _column(row: dict[str, Any], source: str, wanted: str | None) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    name = wanted or ("text" if "text" in row else next(iter(strings), None))
    if name in row:
        return name
    raise InputError(
        f"{source} has no column {'of strings' if name is None else repr(name)}; its "
        f"columns are {', '.join(row)}: name one by text_column."
    )
