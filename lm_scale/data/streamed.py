# SPDX-License-Identifier: Apache-2.0
"""Batches of a stream: made in order and ahead of time, each with the place behind it.

The rows of a batch are dealt to lanes, in equal runs: the first to lane 0. So a batch
follows from (config, seed, its number, how many lanes), whatever processes make it; a
process reads the lanes of which its devices hold rows.

A batch that was made ahead is not yet trained on. So the place to go on from comes with
the batch, and is the one of the batch that was taken last.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_scale.data.ahead import Ahead
from lm_scale.data.shards import Shards
from lm_scale.data.stream import Encode, Lane, Position
from lm_scale.data.windows import batch_number
from lm_scale.objectives import Objective, Vocabulary
from lm_scale.sharding import Rules

HostBatch = dict[str, np.ndarray]  # int32 [rows T]: some rows of a global batch
# The batch behind: its number, and the place of each lane that this process reads.
Place = dict[str, Any]
AHEAD = 8  # batches
# After an error all processes agree to stop, which takes a step more, and then save.
RESERVE = 2


class StreamedBatches:
    """The batches of a stream, from any place that one of its runs has come to.

    Args:
        encode: texts -> ids, each ending with the separator, if there is one.
        batch: examples of a batch, in equal parts from each of `lanes`.
        buffer: documents that are shuffled among one another.
        tokens: what tells this text from another, for the checkpoints.
    """

    def __init__(
        self,
        shards: Shards,
        encode: Encode,
        objective: Objective,
        vocabulary: Vocabulary,
        *,
        batch: int,
        seq_len: int,
        seed: int,
        lanes: int,
        buffer: int,
        tokens: Mapping[str, str | int],
    ):
        self.shards, self.encode, self.tokens = shards, encode, dict(tokens)
        self.objective, self.vocabulary = objective, vocabulary
        self.batch, self.seq_len, self.seed = batch, seq_len, seed
        self.mean_length = float(seq_len)  # tokens of an example
        self.examples = None  # of an epoch: nobody knows
        self.lanes, self.buffer = lanes, buffer
        # Behind the batch that was taken last; None: at the beginning.
        self.place: Place | None = None
        self._made: Ahead[tuple[HostBatch, Place]] | None = None
        self._lanes: list[Lane] = []  # that are open

    @property
    def error(self) -> BaseException | None:
        """Why no more batches will come but the few that are made."""
        return None if self._made is None else self._made.error

    def host_batches(
        self,
        rows: Sequence[int],
        place: Place | None,
        *,
        start: int,
        stop: int,
        left_out: Sequence[tuple[int, int]] = (),
    ) -> Iterator[tuple[HostBatch, Place]]:
        """These rows of the batches of steps start .. stop - 1, with the place behind.

        place: to go on from, in which all lanes of these rows are; None: the beginning.
        """
        each = self.batch // self.lanes
        wanted = {lane: [r % each for r in rows if r // each == lane] for lane in
                  sorted({row // each for row in rows})}  # fmt: skip
        lanes = self._open(list(wanted), place)
        number = batch_number(start, left_out) if place is None else place["batch"]
        try:
            for step in range(start, stop):
                while number < batch_number(step, left_out):
                    for lane in lanes.values():
                        lane.take(each)
                    number += 1
                parts = [
                    self._examples(lanes[i], each, chosen)
                    for i, chosen in wanted.items()
                ]
                number += 1
                behind = {str(i): asdict(lane.position) for i, lane in lanes.items()}
                yield _joined(parts), {"batch": number, "lanes": behind}
        finally:
            for lane in lanes.values():
                lane.close()

    def _open(self, numbers: list[int], place: Place | None) -> dict[int, Lane]:
        positions = {} if place is None else place["lanes"]
        opened = {
            number: Lane(
                self.shards, self.encode, number=number, of=self.lanes, seed=self.seed,
                buffer=self.buffer, length=self.seq_len,
                position=Position(**positions.get(str(number), {})),
            )
            for number in numbers
        }  # fmt: skip
        self._lanes = list(opened.values())
        return opened

    def _examples(self, lane: Lane, count: int, chosen: list[int]) -> HostBatch:
        """Of the next `count` examples of a lane those chosen, ready to be trained on.

        They are numbered on through the epochs; the lanes' numbers interleave.
        """
        first = lane.position.example
        tokens = lane.take(count)[chosen]
        numbers = (first + np.array(chosen)) * self.lanes + lane.number
        examples = [
            self.objective.example(row, self.vocabulary, (self.seed, 0, int(number)))
            for row, number in zip(tokens, numbers, strict=True)
        ]
        return {name: np.stack([x[name] for x in examples]) for name in examples[0]}

    def device_batches(
        self,
        mesh: Mesh,
        rules: Rules,
        *,
        start: int,
        stop: int,
        left_out: Sequence[tuple[int, int]] = (),
        patience: Callable[[], None] = lambda: None,
    ) -> Iterator[dict[str, jax.Array]]:
        """The same as global batches, int32 [batch T] on the mesh, made by a thread.

        Each process reads for the rows of its own devices. They go on from `place`, of
        all lanes, which then follows what is taken. patience: called once a second that
        a batch has to be waited for.
        """
        by_row = NamedSharding(mesh, rules.spec("batch"))
        slices: Any = by_row.addressable_devices_indices_map((self.batch,)).values()
        rows = sorted({row for s in slices for row in range(*s[0].indices(self.batch))})
        sharding = NamedSharding(mesh, rules.spec("batch", "seq"))
        batches = self.host_batches(
            rows, self.place, start=start, stop=stop, left_out=left_out
        )
        made = Ahead(batches, AHEAD, reserve=RESERVE, patience=patience)
        self._made = made
        try:
            for host, behind in made:
                self.place = behind
                yield {
                    name: _global(x, rows, (self.batch, x.shape[1]), sharding)
                    for name, x in host.items()
                }
        finally:
            made.stop()
            for lane in self._lanes:  # the thread may be waiting for one
                lane.close()
            made.close()


def merged(places: Sequence[Place | None]) -> Place | None:
    """The place of a run, of which each process knows its own lanes; None: no stream.

    All processes have taken the same batch last.
    """
    known = [place for place in places if place is not None]
    if not known:
        return None
    lanes = {lane: at for place in known for lane, at in place["lanes"].items()}
    return {"batch": known[0]["batch"], "lanes": lanes}


def _joined(parts: list[HostBatch]) -> HostBatch:
    return {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}


def _global(local: np.ndarray, rows: list[int], shape, sharding) -> jax.Array:
    """The global array of which this process has the (sorted) rows `rows`."""

    def shard(index):
        first, stop, _ = index[0].indices(shape[0])
        at = bisect.bisect_left(rows, first)
        return local[at : at + stop - first, index[1]]

    return jax.make_array_from_callback(shape, sharding, shard)
