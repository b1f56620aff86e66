# SPDX-License-Identifier: Apache-2.0
"""A unit's documents as the batches that are encoded, long ones in pieces.

What becomes of a document does not depend on the batch that it is in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from lm_scale.data.encoding import Texts
from lm_scale.data.parts import Counts

# A batch ends at whichever comes first.
BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 1 << 20  # a tokenizer takes some 200 bytes for each
# A longer document is encoded in pieces of at most so many characters, each cut before
# a space that follows something else. There every byte-level BPE in use (GPT-2's and
# its successors') splits anyhow, before it looks for tokens: they are the same. Only
# where so many characters hold no such space it is cut elsewhere, and a token or two at
# the cut may differ from those of the whole.
PIECE = 1 << 20
MISSING = "\ufffd"  # what stands for bytes that are no UTF-8


@dataclass
class Batch:
    """Documents that end together, and what a part's record has to know of each."""

    texts: list[str] = field(default_factory=list)
    begins: bool = True
    ends: bool = True
    rows: list[int] = field(default_factory=list)  # of the unit, up to each one's end
    # Of the rows since the unit was opened: empty ones, duplicates, documents cut and
    # documents with replaced bytes, up to each one's end; [documents 4].
    counts: list[tuple[int, int, int, int]] = field(default_factory=list)
    last: bool = False  # the unit ends with it
    total: Counts = Counts()  # up to the end of the batch

    @property
    def given(self) -> Texts:
        return Texts(self.texts, self.begins, self.ends)


def batches(
    documents: Iterable[tuple[int, str | None]], dropped: np.ndarray, *, mark: bool
) -> Iterator[Batch]:
    """The batches of a unit; the last one is marked and has no documents.

    Args:
      documents: of `Text.read`.
      dropped: if a row is a duplicate, bool [rows]; rows behind its end are none.
      mark: count documents that hold U+FFFD.
    """
    batch, characters, counts = Batch(), 0, [0, 0, 0, 0]
    for row, text in documents:
        if text is None:
            counts[0] += 1
            continue
        if row < dropped.size and dropped[row]:
            counts[1] += 1
            continue
        if mark and MISSING in text:
            counts[3] += 1
        long = len(text) > PIECE
        if batch.texts and (long or characters + len(text) > BATCH_CHARACTERS):
            yield batch
            batch, characters = Batch(), 0
        if long:
            counts[2] += 1
            yield from _pieces(text, row, counts)
            continue
        batch.texts.append(text)
        batch.rows.append(row + 1)
        batch.counts.append((counts[0], counts[1], counts[2], counts[3]))
        characters += len(text)
        if len(batch.texts) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = Batch(), 0
    if batch.texts:
        yield batch
    yield Batch(last=True, total=Counts(*counts))


def _pieces(text: str, row: int, counts: list[int]) -> Iterator[Batch]:
    start = 0
    while start < len(text):
        stop = cut_before(text, start, start + PIECE)
        ends = stop == len(text)
        batch = Batch([text[start:stop]], begins=start == 0, ends=ends)
        if ends:
            batch.rows.append(row + 1)
            batch.counts.append((counts[0], counts[1], counts[2], counts[3]))
        yield batch
        start = stop


def cut_before(text: str, start: int, stop: int) -> int:
    """The last place up to `stop` where a piece that begins at `start` may end."""
    if stop >= len(text):
        return len(text)
    place = stop
    while (place := text.rfind(" ", start + 1, place + 1)) > start:
        if not text[place - 1].isspace():
            return place
        place -= 1
    return stop
