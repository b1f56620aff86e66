# SPDX-License-Identifier: Apache-2.0
"""Several sources in one stream: which source the example at a place comes from.

A fixed pattern of sources repeats for ever. In it, and so in any beginning of the
stream, the examples of a source are less than one away from its share: the j-th one
stands between the places j/share and (j+1)/share. Giving each place to the source whose
time ends first keeps all of these promises (Baruah et al. 1996, "Proportionate
progress", section 3, of which this is the case of one processor). So the source of a
place, and how many of its examples came before, is a look-up, whatever the place.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lm_scale.errors import InputError

# Shares are multiples of 1 / 65,536 at the finest; what is asked for is exact if it can
# be (weights of up to four decimals that add up to 1 can).
FINEST = 1 << 16
# The pattern is at least so long: where two sources might come first the seed decides,
# so that a short pattern does not fall in step with the rows of a batch.
_LENGTH = 1 << 14


class Mixture:
    """Place in the stream -> source, and which of that source's examples."""

    def __init__(self, weights: Sequence[float], *, seed: int):
        """weights: of the sources, in any unit. Raises InputError as `parts_of`."""
        parts = parts_of(weights)
        whole = sum(parts)
        repeats = -(-_LENGTH // whole)
        self.shares = np.array(parts) / whole  # what is kept; float64 [sources]
        self._sources = _pattern(parts, repeats, seed)
        self._counts = np.array(parts, np.int64) * repeats  # in a pattern, [sources]
        self._before = np.empty(self._sources.size, np.int64)  # of the same source
        for source, count in enumerate(self._counts):
            self._before[self._sources == source] = np.arange(count)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources at these places, and how often each came before; int64 [n]."""
        rounds, within = np.divmod(np.asarray(places, np.int64), self._sources.size)
        sources = self._sources[within]
        return sources, rounds * self._counts[sources] + self._before[within]

    def taken(self, places: int) -> np.ndarray:
        """How many examples of each source the first `places` have, int64 [sources]."""
        rounds, rest = divmod(places, self._sources.size)
        begun = np.bincount(self._sources[:rest], minlength=self._counts.size)
        return rounds * self._counts + begun


def parts_of(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers that add up to `FINEST` at most, none of them 0.

    Raises:
      InputError: there are no weights, too many, or one is not a number above 0.
    """
    if not 0 < len(weights) <= FINEST:
        raise InputError(f"a mixture has 1 to {FINEST} weights; got {len(weights)}.")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise InputError(f"a weight is {weight}; expected a number above 0.")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
    unit = Fraction(
        math.gcd(*(x.numerator for x in exact)),
        math.lcm(*(x.denominator for x in exact)),
    )
    exact = [x / unit / math.gcd(*(int(y / unit) for y in exact)) for x in exact]
    if sum(exact) <= FINEST:
        return [int(x) for x in exact]
    # One for each, and what is left over by the largest remainders.
    left = FINEST - len(weights)
    quotas = [max(Fraction(0), x * FINEST / sum(exact) - 1) for x in exact]
    quotas = [x * left / sum(quotas) for x in quotas]
    parts = [int(x) for x in quotas]
    by_rest = sorted(range(len(parts)), key=lambda i: parts[i] - quotas[i])
    for i in by_rest[: left - sum(parts)]:
        parts[i] += 1
    return [part + 1 for part in parts]


def _pattern(parts: Sequence[int], repeats: int, seed: int) -> np.ndarray:
    """The sources of all places, int64 [repeats * whole]; parts: of a whole."""
    whole = sum(parts)
    length = whole * repeats
    ties = np.random.default_rng(seed).random(length).tolist()  # who goes first
    # Waiting for the place from which on its next example may come: place, source.
    waiting = [(0, source) for source in range(len(parts))]
    ready: list[tuple[int, float, int]] = []  # the place before which it has to come
    done = [0] * len(parts)
    pattern = np.empty(length, np.int64)
    for place in range(length):
        while waiting and waiting[0][0] <= place:
            _, source = heapq.heappop(waiting)
            end = -(-(done[source] + 1) * whole // parts[source])
            heapq.heappush(ready, (end, ties[(end + source) % length], source))
        _, _, source = heapq.heappop(ready)
        pattern[place] = source
        done[source] += 1
        heapq.heappush(waiting, (done[source] * whole // parts[source], source))
    return pattern
