# SPDX-License-Identifier: Apache-2.0
"""Silent corruption: devices that should hold the same weights are compared.

Every device hashes what it holds (hashing.py); those that hold the same part of a
weight must come to the same. A memory or a core that computes wrongly is found so, by
name: in each save, whose hashes are made anyway, and in between if asked for. Weights
that are cut over all devices have no second copy to compare with.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lm_scale.errors import Diverging
from lm_scale.hashing import described, device_hashes, shard_indices
from lm_scale.sharding import Params


class Replicas:
    """Compares the copies of the weights every so many steps; None: never."""

    def __init__(self, every: int | None):
        self.every = every
        self._asked: tuple[int, dict[str, Any], jax.Array] | None = None

    def ask(self, step: int, params: Params) -> None:
        """Has the devices hash the weights after a step, if it is time to."""
        if self.every is None or step % self.every:
            return
        weights = {
            jax.tree_util.keystr(path, simple=True, separator="."): x
            for path, x in jax.tree_util.tree_leaves_with_path(params)
        }
        hashes = device_hashes(list(weights.values()))
        self._asked = step, described(weights), hashes  # the next step has the weights

    def read(self) -> None:
        """Waits for what was asked; raises Diverging if copies differ."""
        if self._asked is not None:
            (step, shapes, hashes), self._asked = self._asked, None
            check_copies(step, shapes, np.asarray(hashes))


def check_copies(step: int, arrays: Mapping[str, Any], hashes: np.ndarray) -> None:
    """Diverging if copies of the same part of an array differ; see `odd_devices`."""
    found = odd_devices(arrays, hashes)
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise Diverging(
            f"After step {step}, copies of the same weights differ:\n{listed}\nA "
            f"device computes or stores wrongly. This was not saved: replace the "
            f"device, and run the same command to go on from the last checkpoint."
        )


def odd_devices(arrays: Mapping[str, Any], hashes: np.ndarray) -> list[str]:
    """Lines that name the devices whose copy of a part of an array is the odd one.

    arrays: what has a shape and a sharding, by path. hashes: [arrays devices], of
    `device_hashes`. Where two copies differ and there is no majority, both are named.
    """
    lines = []
    for (path, x), row in zip(arrays.items(), hashes, strict=True):
        devices = list(x.sharding.mesh.devices.flat)
        holders: dict = {}
        for number, index in enumerate(shard_indices(x.sharding, x.shape)):
            holders.setdefault(index, []).append(number)
        for numbers in holders.values():
            counts = Counter(int(row[n]) for n in numbers)
            if len(counts) == 1:
                continue
            (right, most), (_, next_most) = counts.most_common(2)
            odd = [n for n in numbers if most == next_most or int(row[n]) != right]
            lines += [
                f"{path}: {devices[n]} of process {devices[n].process_index}"
                for n in odd
            ]
    return lines
