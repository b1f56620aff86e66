# SPDX-License-Identifier: Apache-2.0
"""A batch as text: what stands in each row, where it is from, what is to be predicted.

row 3: epoch 0, example 117, 5 of 32 tokens to predict
  document 12, tokens 30-51 of 52:  sat on the⟦ mat→<mask>⟧ and⟦ saw→ dog⟧ one
  document 13, tokens 0-9 of 44: the⟦ cat⟧ had
  padding: 6 tokens
"""

from typing import TYPE_CHECKING, assert_never

import numpy as np
from rich.console import Console

from lm_scale.console import say
from lm_scale.data.examples import Blocks, Documents, Pieces, Source
from lm_scale.data.loader import HostBatch, TrainBatches
from lm_scale.data.mixed import Mixed
from lm_scale.data.shown import text_of
from lm_scale.data.where import Piece, pieces
from lm_scale.objectives import IGNORE, MaskedLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEGEND = (
    "⟦original→shown⟧: hidden, to be predicted; ⟦original⟧: to be predicted, but left "
    "as it is"
)


def show(
    batches: TrainBatches,
    tokenizer: "PreTrainedTokenizerFast",
    number: int,
    rows: range,
    console: Console,
) -> None:
    """Prints these rows of the batch of a number (windows.py); reads no others."""
    epochs, examples = batches.place(number, rows)
    batch = batches.rows(number, rows)
    masked = isinstance(batches.objective, MaskedLM)
    if masked:
        say(console, LEGEND)
    for at, row in enumerate(rows):
        epoch, example = int(epochs[at]), int(examples[at])
        one = {name: values[at] for name, values in batch.items()}
        labels = int((one["labels"] != IGNORE).sum())
        source, of = batches.source, ""
        if isinstance(source, Mixed):
            name, source, example = source.owner(example)
            of = f" of {name}"
        say(
            console,
            f"row {row}: epoch {epoch}{of}, example {example}, {labels} of "
            f"{one['tokens'].size} tokens to predict",
        )
        for line in lines_of(tokenizer, pieces_of(source, example), one, masked):
            say(console, f"  {line}")


def pieces_of(source: Source, example: int) -> list[Piece]:
    """What an example is made of, in the order of its tokens."""
    if isinstance(source, Blocks):
        first = example * source.seq_len
        return pieces(source.store, first, first + source.seq_len)
    if isinstance(source, Documents):
        whole = int(source.store.lengths(np.array([example]))[0])
        return [Piece(example, 0, min(whole, source.seq_len), whole)]
    if isinstance(source, Pieces):
        plan, found = source.plan, []
        for number in range(plan.rows[example], plan.rows[example + 1]):
            first = int(plan.starts[number])
            found += pieces(source.store, first, first + int(plan.lengths[number]))
        return found
    assert_never(source)


def lines_of(tokenizer, found: list[Piece], row: HostBatch, masked: bool) -> list[str]:
    """One line for each piece of a row, and one for its padding. Values of row: [T].

    masked: the labels are what was hidden, and not the next tokens.
    """
    lines, at = [], 0
    for piece in found:
        here = slice(at, at + piece.tokens)
        at += piece.tokens
        last = piece.first + piece.tokens - 1
        name = f"document {piece.document}, tokens {piece.first}-{last}"
        if "segments" in row:
            name = f"segment {row['segments'][here.start]}, {name}"
        labels = row["labels"][here] if masked else np.full(piece.tokens, IGNORE)
        text = marked(tokenizer, row["tokens"][here], labels)
        lines.append(f"{name} of {piece.whole}: {text}")
    if at < row["tokens"].size:
        lines.append(f"padding: {row['tokens'].size - at} tokens")
    return lines


def marked(tokenizer, tokens: np.ndarray, labels: np.ndarray) -> str:
    """The text of tokens [T], with what is hidden beside what hides it.

    labels: int [T], the original token where it is to be predicted, else IGNORE.
    """
    chosen = labels != IGNORE
    # A run is a token that is to be predicted, or all tokens up to the next such.
    borders = np.flatnonzero(chosen[1:] | chosen[:-1]) + 1
    parts = []
    for run, wanted in zip(
        np.split(tokens, borders), np.split(labels, borders), strict=True
    ):
        text = text_of(tokenizer, run)
        if wanted[0] != IGNORE:
            original = text_of(tokenizer, wanted)
            same = bool(wanted[0] == run[0])
            text = f"⟦{original}⟧" if same else f"⟦{original}→{text}⟧"
        parts.append(text)
    return "".join(parts)
