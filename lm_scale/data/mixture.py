# SPDX-License-Identifier: Apache-2.0
"""Several sources in one stream: which source the example at a place comes from.

A fixed pattern of sources repeats for ever. As it is made, the examples of a source are
less than one away from its share in any beginning of it: the j-th one stands between
the places j/share and (j+1)/share. Giving each place to the source whose time ends
first keeps all of these promises (Baruah et al. 1996, "Proportionate progress", section
3, of which this is the case of one processor). But it is nearly periodic: a row of the
batches could be of one source for ever. So the places are then shuffled within windows
of `WINDOW`. Beginnings stay less than one away from the shares where a window ends, and
elsewhere, for a source with the share s, less than 1 + WINDOW s (1 - s), 17 at most.

So the source of a place, and how many of its examples came before, is a look-up,
whatever the place.
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
WINDOW = 64  # places; batches of a multiple of it are as even as they can be
# The pattern is at least so long, for many shuffled windows.
_LENGTH = 1 << 16


class Mixture:
    """Place in the stream -> source, and which of that source's examples."""

    def __init__(self, weights: Sequence[float], *, seed: int):
        """weights: of the sources, in any unit. Raises InputError as `parts_of`."""
        parts = parts_of(weights)
        whole = sum(parts)
        unit = WINDOW // math.gcd(WINDOW, whole)  # repeats that make whole windows
        # Odd: the fewer factors it shares with a batch, the more of it a row gets.
        repeats = unit * (-(-_LENGTH // (whole * unit)) | 1)
        self.shares = np.array(parts) / whole  # what is kept; float64 [sources]
        self._sources = _stirred(np.tile(_pattern(parts), repeats), seed)
        self.length = self._sources.size  # after which it repeats
        self._counts = np.array(parts, np.int64) * repeats  # in a pattern, [sources]
        self._before = np.empty(self._sources.size, np.int64)  # of the same source
        for source, count in enumerate(self._counts):
            self._before[self._sources == source] = np.arange(count)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources at these places, and how often each came before; int64 [n]."""
        rounds, within = np.divmod(np.asarray(places, np.int64), self.length)
        sources = self._sources[within]
        return sources, rounds * self._counts[sources] + self._before[within]

    def taken(self, places: int) -> np.ndarray:
        """How many examples of each source the first `places` have, int64 [sources]."""
        rounds, rest = divmod(places, self.length)
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


def _pattern(parts: Sequence[int]) -> np.ndarray:
    """The sources of a whole, int64 [sum of the parts]."""
    whole = sum(parts)
    # Waiting for the place from which on its next example may come: place, source.
    waiting = [(0, source) for source in range(len(parts))]
    ready: list[tuple[int, int]] = []  # the place before which it has to come, source
    done = [0] * len(parts)
    pattern = np.empty(whole, np.int64)
    for place in range(whole):
        while waiting and waiting[0][0] <= place:
            _, source = heapq.heappop(waiting)
            end = -(-(done[source] + 1) * whole // parts[source])
            heapq.heappush(ready, (end, source))
        _, source = heapq.heappop(ready)
        pattern[place] = source
        done[source] += 1
        heapq.heappush(waiting, (done[source] * whole // parts[source], source))
    return pattern


def _stirred(pattern: np.ndarray, seed: int) -> np.ndarray:
    """The pattern with each window of it shuffled."""
    windows = np.arange(pattern.size) // WINDOW
    # Raw, as numpy may change what it makes of them, and a run has to go on.
    by_chance = np.random.Philox(np.random.SeedSequence(seed)).random_raw(pattern.size)
    return pattern[np.lexsort((by_chance, windows))]
