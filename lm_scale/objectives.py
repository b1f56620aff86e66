# SPDX-License-Identifier: Apache-2.0
"""What a model is asked to predict: numpy, rows of tokens -> examples; knows no model.

The examples of a batch are int32 arrays: `tokens` [B T] (the input), `labels` [B T]
(the targets; -100 where nothing is to be predicted), and perhaps `masked_positions`
[B M], the places that have labels. Noise is drawn from a counter-based generator keyed
by (seed, epoch, example number), never from a stream, so a row is the same whoever
makes it, when, and beside which others; padding behind it changes nothing either.
"""

import functools
from dataclasses import dataclass

import numpy as np

from lm_scale.errors import InputError
from lm_scale.splitmix import streams

IGNORE = -100
NOWHERE = -1  # fills up `masked_positions`
Examples = dict[str, np.ndarray]


@dataclass(frozen=True)
class Vocabulary:
    """What an objective has to know of the tokenizer."""

    size: int
    special_ids: tuple[int, ...]
    mask_id: int | None
    pad_id: int | None = None


@dataclass(frozen=True)
class NoiseKeys:
    """What the noise of each row depends on."""

    seed: int
    epochs: np.ndarray  # whole numbers [B]
    numbers: np.ndarray  # of the examples [B]

    def draw(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Two even draws from 0 ... 2**32 - 1 for each place, both uint32 [B width]."""
        raw = streams((self.seed, self.epochs, self.numbers), width)
        return (raw >> np.uint64(32)).astype(np.uint32), raw.astype(np.uint32)


@dataclass(frozen=True)
class CausalLM:
    """Predict each next token. The last place of a row or document has no target."""

    def check(self, vocabulary: Vocabulary) -> None:
        """Any vocabulary will do."""

    def head_share(self, width: int) -> float:
        """At what share of the places of such a row the model's head works."""
        return 1.0

    def examples(
        self,
        tokens: np.ndarray,
        vocabulary: Vocabulary,
        keys: NoiseKeys,
        segments: np.ndarray | None = None,
    ) -> Examples:
        """tokens: int32 [B T].

        segments [B T]: a number for each document of a row, 0 at padding.
        """
        labels = np.full_like(tokens, IGNORE)
        labels[:, :-1] = tokens[:, 1:]
        if segments is not None:
            here, after = segments[:, :-1], segments[:, 1:]
            labels[:, :-1][(here != after) | (here == 0)] = IGNORE
        return {"tokens": tokens, "labels": labels}


@dataclass(frozen=True)
class MaskedLM:
    """Predict tokens that were hidden (Devlin et al. 2019, section 3.1).

    `fixed_count` says how many are chosen of the n tokens of a row that are neither
    special nor padding. False, as in BERT's description: each is drawn by itself, so
    that their number varies. True, as in BERT's program: exactly `round(probability *
    n)` of them (a half to the even number), and at least one if n > 0; every choice of
    so many is equally likely. The examples then have `masked_positions` besides: the
    chosen places in ascending order, then -1, in a row of `round(probability * T)`
    whatever is chosen. So the model's head works at these places alone, a share
    `probability` of its FLOPs and memory, and the loss is the same.
    """

    probability: float = 0.15  # that a token which is not special has to be predicted
    masked: float = 0.8  # of those: replaced by the mask token
    random: float = 0.1  # of those: replaced by any token; the rest stay as they are
    fixed_count: bool = False  # exactly that share of each sequence, see above

    def __post_init__(self):
        shares = (self.masked, self.random, self.masked + self.random)
        if not 0 < self.probability < 1 or not all(0 <= x <= 1 for x in shares):
            raise InputError(
                f"objective: expected 0 < probability < 1 and masked + random <= 1, "
                f"got probability = {self.probability}, masked = {self.masked}, "
                f"random = {self.random}."
            )

    def head_share(self, width: int) -> float:
        """At what share of the places of such a row the model's head works."""
        return self._most(width) / width if self.fixed_count else 1.0

    def _most(self, width: int) -> int:
        """How many places of a row `fixed_count` chooses at most."""
        return max(1, round(self.probability * width))

    def check(self, vocabulary: Vocabulary) -> None:
        """InputError if the tokenizer has no mask token."""
        if vocabulary.mask_id is None:
            raise InputError(
                "Masked LM needs a tokenizer with a mask token, and this one has none. "
                "Train one of kind `roberta` or add the token `<mask>`."
            )

    def examples(
        self,
        tokens: np.ndarray,
        vocabulary: Vocabulary,
        keys: NoiseKeys,
        segments: np.ndarray | None = None,
    ) -> Examples:
        """tokens: int32 [B T]; segments [B T]: 0 at padding."""
        choice, fate = keys.draw(tokens.shape[1])
        open_to_choice = ~_is_special(vocabulary)[tokens]
        if segments is not None:
            open_to_choice &= segments > 0
        if self.fixed_count:
            chosen = _smallest(choice, open_to_choice, self.probability)
        else:
            chosen = open_to_choice & (choice < _of_32_bits(self.probability))
        places = np.flatnonzero(chosen)
        asked = tokens.ravel()[places]
        hidden, labels = tokens.flatten(), np.full(tokens.size, IGNORE, np.int32)
        hidden[places] = self._hide(asked, fate.reshape(-1)[places], vocabulary)
        labels[places] = asked
        example = {
            "tokens": hidden.reshape(tokens.shape),
            "labels": labels.reshape(tokens.shape),
        }
        if self.fixed_count:
            most = self._most(tokens.shape[1])
            example["masked_positions"] = _places(chosen, most)
        return example

    def _hide(
        self, tokens: np.ndarray, fate: np.ndarray, vocabulary: Vocabulary
    ) -> np.ndarray:
        """What stands in the place of the chosen tokens [n], by their even draws."""
        fate = fate.astype(np.uint64)
        masked = _of_32_bits(self.masked)
        swapped = _of_32_bits(self.masked + self.random)
        # Where in its interval a draw lies tells which of all tokens it is.
        span = max(swapped - masked, np.uint64(1))
        anything = (fate - masked) * np.uint64(vocabulary.size) // span
        hidden = np.where(fate < swapped, anything.astype(np.int32), tokens)
        return np.where(fate < masked, np.int32(vocabulary.mask_id or 0), hidden)


def _of_32_bits(share: float) -> np.uint64:
    return np.uint64(round(share * 2**32))


@functools.lru_cache(maxsize=4)
def _is_special(vocabulary: Vocabulary) -> np.ndarray:
    """bool [size]: if a token is special."""
    table = np.zeros(max(vocabulary.size, *vocabulary.special_ids, 0) + 1, bool)
    table[list(vocabulary.special_ids)] = True
    return table


def _smallest(
    draws: np.ndarray, open_to_choice: np.ndarray, share: float
) -> np.ndarray:
    """bool [B T]: of the open places of each row, the share with the smallest draws."""
    width = draws.shape[1]
    count = open_to_choice.sum(axis=1)
    wanted = np.clip(
        np.rint(share * count).astype(np.int64), np.minimum(count, 1), None
    )
    # The place behind the draw, so that no two are equal.
    places = np.arange(width, dtype=np.uint64)
    ranks = (draws.astype(np.uint64) << np.uint64(31)) | places
    ranks[~open_to_choice] = np.iinfo(np.uint64).max
    last = np.maximum(wanted - 1, 0)
    ordered = np.partition(ranks, np.unique(last), axis=1)
    return open_to_choice & (ranks <= np.take_along_axis(ordered, last[:, None], 1))


def _places(chosen: np.ndarray, most: int) -> np.ndarray:
    """The places [B most] of what is chosen [B T], in order, then NOWHERE."""
    counts = chosen.sum(axis=1)
    found = np.full((chosen.shape[0], most), NOWHERE, np.int32)
    found[np.arange(most) < counts[:, None]] = np.nonzero(chosen)[1]
    return found


Objective = CausalLM | MaskedLM
