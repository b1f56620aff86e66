# SPDX-License-Identifier: Apache-2.0
"""Several sources of examples as one, mixed by weight.

Their examples are numbered one source after the other. Each source has epochs of its
own: a small one with a large weight begins its second while others are in their first.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lm_scale.data.examples import Rows, Source
from lm_scale.data.mixture import Mixture
from lm_scale.data.order import shuffled
from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError


@dataclass(frozen=True)
class Mixed:
    """Sources by name, and how they are mixed, in the same order."""

    sources: Mapping[str, Source]
    mixture: Mixture

    def __post_init__(self):
        widths = {source.fixed_width for source in self.sources.values()}
        if len(widths) > 1:
            raise InputError(
                f"the sources of a mixture make rows of {sorted(map(str, widths))} "
                "tokens; expected one kind of examples for all."
            )

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @functools.cached_property
    def firsts(self) -> np.ndarray:
        """The number of each source's first example, and of one past the last."""
        return np.cumsum([0, *map(len, self.sources.values())])

    @property
    def fixed_width(self) -> int | None:
        """Of the rows of every batch; None: they differ."""
        return next(iter(self.sources.values())).fixed_width

    @property
    def mean_length(self) -> float:
        """Tokens of an example, about, as they are mixed."""
        means = [source.mean_length for source in self.sources.values()]
        return float(np.dot(means, self.mixture.shares))

    def owner(self, number: int) -> tuple[str, Source, int]:
        """Which source an example is of, and its number there."""
        at = int(np.searchsorted(self.firsts, number, side="right")) - 1
        name = list(self.sources)[at]
        return name, self.sources[name], number - int(self.firsts[at])

    def place(self, places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs, each of its own source, and numbers of the examples; int64 [n]."""
        owners, visits = self.mixture.at(places)
        epochs, numbers = np.empty_like(visits), np.empty_like(visits)
        for at, source in enumerate(self.sources.values()):
            here = np.flatnonzero(owners == at)
            epochs[here], within = np.divmod(visits[here], len(source))
            for epoch in np.unique(epochs[here]):
                now = epochs[here] == epoch
                order = shuffled(within[now], len(source), (seed, int(epoch), at))
                numbers[here[now]] = self.firsts[at] + order
        return epochs, numbers

    def read(self, numbers: np.ndarray, width: int, pad_id: int) -> Rows:
        """These examples, in rows of `width`; each source is read once."""
        owners = np.searchsorted(self.firsts, numbers, side="right") - 1
        found: dict[str, np.ndarray] = {}
        for at, source in enumerate(self.sources.values()):
            here = owners == at
            if not here.any():
                continue
            rows = source.read(numbers[here] - self.firsts[at], width, pad_id)
            for name, values in vars(rows).items():
                if values is not None:
                    shape = (numbers.size, width)
                    found.setdefault(name, np.empty(shape, np.int32))[here] = values
        return Rows(**found)

    def width(self, numbers: np.ndarray) -> int:
        """The length of the rows of a batch with these examples."""
        owners = np.searchsorted(self.firsts, numbers, side="right") - 1
        return max(
            source.width(numbers[owners == at] - self.firsts[at])
            for at, source in enumerate(self.sources.values())
            if np.any(owners == at)
        )

    def epochs(self, examples: int) -> dict[str, float]:
        """How often each source has been seen when so many examples were."""
        taken = self.mixture.taken(examples)
        return {
            name: count / len(source)
            for count, (name, source) in zip(taken, self.sources.items(), strict=True)
        }


def stores_of(source: Source | Mixed) -> dict[str, tuple[TokenStore, float]]:
    """The token stores by the names of their sources, with their shares, 0 to 1.

    One source that is no mixture has the name "".
    """
    if not isinstance(source, Mixed):
        return {"": (source.store, 1.0)}
    shares = source.mixture.shares.tolist()
    return {
        name: (one.store, share)
        for (name, one), share in zip(source.sources.items(), shares, strict=True)
    }
