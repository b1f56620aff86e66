# SPDX-License-Identifier: Apache-2.0
"""Batches: a pure function of (config, step).

The corpus is a list of examples (data/examples.py). Every epoch visits each of them
once, in an order that a keyed permutation gives without being stored; batches run on
across the end of an epoch. So the position in the data *is* the step number: resuming
needs nothing else (but the windows that are left out, if there are any: windows.py),
any batch can be made again by its number, and each process makes just the rows that its
devices hold.
"""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_scale.data.examples import Source
from lm_scale.data.mixed import Mixed
from lm_scale.data.order import shuffled
from lm_scale.data.windows import batch_number
from lm_scale.objectives import IGNORE, NoiseKeys, Objective, Vocabulary
from lm_scale.sharding import Rules

T = TypeVar("T")
HostBatch = dict[str, np.ndarray]  # int32 [rows T or M]: some rows of a global batch
AHEAD = 1  # batches that are on their way to the devices while a step runs


class Batches:
    """Batch number -> the chosen rows of that batch, made anew each time."""

    def __init__(
        self,
        source: Source | Mixed,
        objective: Objective,
        vocabulary: Vocabulary,
        *,
        batch: int,
        seed: int,
    ):
        self.source, self.objective, self.vocabulary = source, objective, vocabulary
        self.batch, self.seed, self.examples = batch, seed, len(source)
        self.mean_length = source.mean_length  # tokens
        # What the number of a step does not tell, of a stream (data/streamed.py) alone:
        # where it goes on, and why it does not.
        self.reached: dict[str, Any] | None = None
        self.error: BaseException | None = None

    def make(self, epochs: np.ndarray, numbers: np.ndarray, width: int) -> HostBatch:
        """Examples by number, with the noise of their epochs; rows in that order.

        Shorter examples are padded to `width`. Where rows hold padding or several
        documents there are `segments`, and `positions` if these begin anew in each.
        """
        rows = self.source.read(numbers, width, self.vocabulary.pad_id or 0)
        keys = NoiseKeys(self.seed, epochs, numbers)
        batch = self.objective.examples(
            rows.tokens, self.vocabulary, keys, rows.segments
        )
        placed = {"segments": rows.segments, "positions": rows.positions}
        return batch | {name: x for name, x in placed.items() if x is not None}


class TrainBatches(Batches):
    """Endless shuffled epochs."""

    def place(self, step: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and example numbers of these rows of the batch of a step."""
        places = step * self.batch + np.asarray(rows, np.int64)
        if isinstance(self.source, Mixed):
            return self.source.place(places, self.seed)
        epochs = places // self.examples
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = shuffled(
                places[here] % self.examples, self.examples, (self.seed, int(epoch))
            )
        return epochs, numbers

    def rows(self, step: int, rows: Sequence[int]) -> HostBatch:
        """These rows of the batch of a step (counted from 0)."""
        # The width is that of the whole batch, whoever makes the other rows.
        width = self.source.fixed_width or self.source.width(
            self.place(step, range(self.batch))[1]
        )
        return self.make(*self.place(step, rows), width)

    def epochs(self, batches: int) -> dict[str, float]:
        """How often the first so many batches show each source; "": the only one."""
        examples = batches * self.batch
        if isinstance(self.source, Mixed):
            return self.source.epochs(examples)
        return {"": examples / self.examples}


class EvalBatches(Batches):
    """Each example once, in order, with the same noise every time."""

    def __len__(self) -> int:
        return -(-self.examples // self.batch)

    def rows(self, step: int, rows: Sequence[int]) -> HostBatch:
        """These rows of batch `step`; rows behind the last example have no labels."""
        first, last = step * self.batch, self.examples - 1
        width = self.source.fixed_width or self.source.width(
            np.arange(first, min(first + self.batch, self.examples))
        )
        numbers = first + np.asarray(rows, np.int64)
        real = numbers <= last
        numbers = np.minimum(numbers, last)
        batch = self.make(np.zeros_like(numbers), numbers, width)
        batch["labels"] = np.where(real[:, None], batch["labels"], np.int32(IGNORE))
        return batch


class LocalRows:
    """`batches` as grain sees them: step -> this process's rows, for `steps` steps."""

    def __init__(self, batches: TrainBatches | EvalBatches, rows, steps: int, left_out):
        self.batches, self.rows, self.steps = batches, rows, steps
        self.left_out = left_out

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, record_key: int) -> HostBatch:  # grain's name for the step
        return self.batches.rows(batch_number(record_key, self.left_out), self.rows)


def device_batches(
    batches: TrainBatches | EvalBatches,
    mesh: Mesh,
    rules: Rules,
    *,
    start: int,
    stop: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> Iterator[dict[str, jax.Array]]:
    """The global batches of steps start .. stop - 1, int32 [batch T] on the mesh.

    Made ahead of time by threads, and the next one is sent to the devices before it is
    asked for; each process reads the rows of its own devices. left_out: `Windows` of
    batch numbers that no step gets.
    """
    if start >= stop:
        return
    rows = rows_here(mesh, rules, batches.batch)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    local: Any = LocalRows(batches, rows, stop, left_out)  # all that grain asks for
    source = grain.MapDataset.source(local)
    yield from sent_ahead(
        on_mesh(host, rows, batches.batch, mesh, rules)
        for host in source[start:].to_iter_dataset(options)
    )


def rows_here(mesh: Mesh, rules: Rules, batch: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, in order."""
    by_row = NamedSharding(mesh, rules.spec("batch"))
    slices: Any = by_row.addressable_devices_indices_map((batch,)).values()
    return sorted({row for s in slices for row in range(*s[0].indices(batch))})


def on_mesh(
    host: HostBatch, rows: list[int], batch: int, mesh: Mesh, rules: Rules
) -> dict[str, jax.Array]:
    """The global batch, int32 [batch T or M], of which this process has these rows."""
    by_token = NamedSharding(mesh, rules.spec("batch", "seq"))
    # Those of a row that has been cut are known to all devices that share it.
    shardings = {"masked_positions": NamedSharding(mesh, rules.spec("batch", None))}
    return {
        name: _global(x, rows, (batch, x.shape[1]), shardings.get(name, by_token))
        for name, x in host.items()
    }


def sent_ahead(batches: Iterator[T]) -> Iterator[T]:
    """The same; `AHEAD` more are on their way to the devices than were asked for.

    What `batches` raises is raised when all that came before has been taken.
    """
    sent: deque[T] = deque()
    try:
        for batch in batches:
            sent.append(batch)
            if len(sent) > AHEAD:
                yield sent.popleft()
    except Exception:
        yield from sent
        raise
    yield from sent


def _global(local: np.ndarray, rows: list[int], shape, sharding) -> jax.Array:
    """The global array of which this process has the (sorted) rows `rows`."""

    def shard(index):
        first, stop, _ = index[0].indices(shape[0])
        at = bisect.bisect_left(rows, first)
        return local[at : at + stop - first, index[1]]

    return jax.make_array_from_callback(shape, sharding, shard)
