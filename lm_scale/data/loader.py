# SPDX-License-Identifier: Apache-2.0
"""Batches: a pure function of (config, step).

The corpus is cut into examples of `seq_len` tokens. Every epoch visits each of them
once, in an order that a keyed permutation gives without being stored; batches run on
across the end of an epoch. So the position in the data *is* the step number: resuming
needs nothing else, any batch can be made again by its number, and each process makes
just the rows that its devices hold.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError
from lm_scale.objectives import IGNORE, Objective, Vocabulary
from lm_scale.sharding import Rules

HostBatch = dict[str, np.ndarray]  # int32 [rows T]: some rows of a global batch


class Batches:
    """Batch number -> the chosen rows of that batch, made anew each time."""

    def __init__(
        self,
        store: TokenStore,
        objective: Objective,
        vocabulary: Vocabulary,
        *,
        seq_len: int,
        batch: int,
        seed: int,
    ):
        self.store, self.objective, self.vocabulary = store, objective, vocabulary
        self.seq_len, self.batch, self.seed = seq_len, batch, seed
        self.examples = store.num_tokens // seq_len  # the last, shorter piece is left
        if self.examples == 0:
            raise InputError(
                f"{store.path} holds {store.num_tokens} tokens, fewer than one "
                f"sequence of {seq_len}. Give more text or shorten `seq_len`."
            )

    def order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Numbers of the examples that stand at these places of an epoch's order."""
        (key,) = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        last = self.examples - 1
        shuffle = grain.experimental.index_shuffle
        numbers = [
            shuffle(int(i), max_index=last, seed=int(key), rounds=4) for i in places
        ]
        return np.array(numbers, np.int64)

    def make(self, epochs: np.ndarray, numbers: np.ndarray) -> HostBatch:
        """Examples by number, with the noise of their epochs; rows in that order."""
        blocks = self.store.read_blocks(numbers * self.seq_len, self.seq_len)
        examples = [
            self.objective.example(
                tokens, self.vocabulary, (self.seed, int(epoch), int(number))
            )
            for tokens, epoch, number in zip(blocks, epochs, numbers, strict=True)
        ]
        return {
            name: np.stack([example[name] for example in examples])
            for name in examples[0]
        }


class TrainBatches(Batches):
    """Endless shuffled epochs."""

    def rows(self, step: int, rows: Sequence[int]) -> HostBatch:
        """These rows of the batch of a step (counted from 0)."""
        places = step * self.batch + np.asarray(rows, np.int64)
        epochs = places // self.examples
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self.order(int(epoch), places[here] % self.examples)
        return self.make(epochs, numbers)


class EvalBatches(Batches):
    """Each example once, in order, with the same noise every time."""

    def __len__(self) -> int:
        return -(-self.examples // self.batch)

    def rows(self, step: int, rows: Sequence[int]) -> HostBatch:
        """These rows of batch `step`; rows behind the last example have no labels."""
        numbers = step * self.batch + np.asarray(rows, np.int64)
        real = numbers < self.examples
        numbers = np.minimum(numbers, self.examples - 1)
        batch = self.make(np.zeros_like(numbers), numbers)
        batch["labels"] = np.where(real[:, None], batch["labels"], np.int32(IGNORE))
        return batch


class LocalRows:
    """`batches` as grain sees them: step -> this process's rows, for `steps` steps."""

    def __init__(self, batches: TrainBatches | EvalBatches, rows, steps: int):
        self.batches, self.rows, self.steps = batches, rows, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, record_key: int) -> HostBatch:  # grain's name for the step
        return self.batches.rows(record_key, self.rows)


def device_batches(
    batches: TrainBatches | EvalBatches,
    mesh: Mesh,
    rules: Rules,
    *,
    start: int,
    stop: int,
) -> Iterator[dict[str, jax.Array]]:
    """The global batches of steps start .. stop - 1, int32 [batch seq_len] on the mesh.

    Made ahead of time by threads; each process reads the rows of its own devices.
    """
    if start >= stop:
        return
    sharding = NamedSharding(mesh, rules.spec("batch", "seq"))
    shape = (batches.batch, batches.seq_len)
    slices: Any = sharding.addressable_devices_indices_map(shape).values()
    rows = sorted({row for s in slices for row in range(*s[0].indices(shape[0]))})
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    local: Any = LocalRows(batches, rows, stop)  # all that grain asks of a source
    source = grain.MapDataset.source(local)
    for host in source[start:].to_iter_dataset(options):
        yield {name: _global(x, rows, shape, sharding) for name, x in host.items()}


def _global(local: np.ndarray, rows: list[int], shape, sharding) -> jax.Array:
    """The global array of which this process has the (sorted) rows `rows`."""

    def shard(index):
        first, stop, _ = index[0].indices(shape[0])
        at = bisect.bisect_left(rows, first)
        return local[at : at + stop - first, index[1]]

    return jax.make_array_from_callback(shape, sharding, shard)
