# SPDX-License-Identifier: Apache-2.0
"""What a model is asked to predict: numpy, tokens -> example; knows no model.

An example is a dict of equally long int32 arrays: `tokens` (the input) and `labels`
(the targets; -100 where nothing is to be predicted). Noise is drawn from a
counter-based generator keyed by (seed, epoch, example number), never from a stream, so
an example is the same whoever makes it and whenever.
"""

from dataclasses import dataclass

import numpy as np

from lm_scale.errors import InputError

IGNORE = -100
NoiseKey = tuple[int, int, int]  # seed, epoch, example number
Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class Vocabulary:
    """What an objective has to know of the tokenizer."""

    size: int
    special_ids: tuple[int, ...]
    mask_id: int | None
    pad_id: int | None = None


@dataclass(frozen=True)
class CausalLM:
    """Predict each next token. The last position has no target."""

    def check(self, vocabulary: Vocabulary) -> None:
        """Any vocabulary will do."""

    def example(
        self, tokens: np.ndarray, vocabulary: Vocabulary, key: NoiseKey
    ) -> Example:
        """tokens: int32 [T]."""
        labels = np.full_like(tokens, IGNORE)
        labels[:-1] = tokens[1:]
        return {"tokens": tokens, "labels": labels}


@dataclass(frozen=True)
class MaskedLM:
    """Predict tokens that were hidden (Devlin et al. 2019, section 3.1)."""

    probability: float = 0.15  # that a token which is not special has to be predicted
    masked: float = 0.8  # of those: replaced by the mask token
    random: float = 0.1  # of those: replaced by any token; the rest stay as they are

    def __post_init__(self):
        shares = (self.masked, self.random, self.masked + self.random)
        if not 0 < self.probability < 1 or not all(0 <= x <= 1 for x in shares):
            raise InputError(
                f"objective: expected 0 < probability < 1 and masked + random <= 1, "
                f"got probability = {self.probability}, masked = {self.masked}, "
                f"random = {self.random}."
            )

    def check(self, vocabulary: Vocabulary) -> None:
        """InputError if the tokenizer has no mask token."""
        if vocabulary.mask_id is None:
            raise InputError(
                "Masked LM needs a tokenizer with a mask token, and this one has none. "
                "Train one of kind `roberta` or add the token `<mask>`."
            )

    def example(
        self, tokens: np.ndarray, vocabulary: Vocabulary, key: NoiseKey
    ) -> Example:
        """tokens: int32 [T]. Each token is drawn by itself; special ones never."""
        seed, epoch, number = key
        noise = np.random.Generator(
            np.random.Philox(key=seed, counter=[0, 0, epoch, number])
        )
        chosen = noise.random(tokens.shape, np.float32) < self.probability
        chosen &= ~np.isin(tokens, vocabulary.special_ids)
        fate = noise.random(tokens.shape, np.float32)
        anything = noise.integers(0, vocabulary.size, tokens.shape, np.int32)
        masks = np.full_like(tokens, vocabulary.mask_id)
        hidden = np.where(fate < self.masked, masks, tokens)
        swapped = (fate >= self.masked) & (fate < self.masked + self.random)
        hidden = np.where(swapped, anything, hidden)
        return {
            "tokens": np.where(chosen, hidden, tokens),
            "labels": np.where(chosen, tokens, np.int32(IGNORE)),
        }


Objective = CausalLM | MaskedLM
