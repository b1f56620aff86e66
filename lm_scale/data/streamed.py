# SPDX-License-Identifier: Apache-2.0
"""Batches of a stream: made in order and ahead of time, each with the place behind it.

The rows of a batch are dealt to lanes, in equal runs: the first to lane 0. So a batch
follows from (config, seed, its number, how many lanes), whatever processes make it; a
process reads the lanes of which its devices hold rows.

A batch that was made ahead is not yet trained on. So the place to go on from comes with
the batch, and is the one of the batch that was taken last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm_scale.data.ahead import Ahead
from lm_scale.data.loader import HostBatch, on_mesh, rows_here, sent_ahead
from lm_scale.data.shards import Shards
from lm_scale.data.stream import Encode, Lane, Position
from lm_scale.data.windows import batch_number
from lm_scale.objectives import NoiseKeys, Objective, Vocabulary
from lm_scale.sharding import Rules

# The batch behind: its number, and the place of each lane that this process reads.
Place = dict[str, Any]
AHEAD = 8  # batches
# After an error all processes agree to stop, which takes a step more, and then save.
RESERVE = 2


class StreamedBatches:
    """The batches of a stream, from any place that one of its runs has come to.

    Args:
        encode: the tokens of some texts, such as an `Encoder`.
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
        # The place behind the batch that was taken last; None: at the beginning.
        self.reached: Place | None = None
        self._made: Ahead[tuple[HostBatch, Place]] | None = None
        self._lanes: list[Lane] = []  # that are open

    @property
    def error(self) -> BaseException | None:
        """Why no more batches will come but the few that are made."""
        return None if self._made is None else self._made.error

    def epochs(self, batches: int) -> dict[str, float]:
        """How often the first so many batches show each source: nobody knows."""
        return {}

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
                host = self._examples(lanes, each, wanted)
                number += 1
                behind = {str(i): asdict(lane.position) for i, lane in lanes.items()}
                yield host, {"batch": number, "lanes": behind}
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

    def _examples(
        self, lanes: dict[int, Lane], count: int, wanted: dict[int, list[int]]
    ) -> HostBatch:
        """Of the next `count` examples of each lane those wanted, ready for training.

        They are numbered on through the epochs; the lanes' numbers interleave.
        """
        tokens, numbers = [], []
        for i, lane in lanes.items():
            places = lane.position.example + np.array(wanted[i])
            numbers.append(places * self.lanes + i)
            tokens.append(lane.take(count)[wanted[i]])
        of_rows = np.concatenate(numbers)
        keys = NoiseKeys(self.seed, np.zeros_like(of_rows), of_rows)
        return self.objective.examples(np.concatenate(tokens), self.vocabulary, keys)

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
        """The same as global batches, int32 [batch T or M] on the mesh.

        Made by a thread, and the next one is sent to the devices before it is asked
        for; each process reads for the rows of its own devices. They go on from
        `reached`, of all lanes, which then follows what is taken. patience: called once
        a second that a batch has to be waited for.
        """
        rows = rows_here(mesh, rules, self.batch)
        batches = self.host_batches(
            rows, self.reached, start=start, stop=stop, left_out=left_out
        )
        made = Ahead(batches, AHEAD, reserve=RESERVE, patience=patience)
        self._made = made
        try:
            sent = sent_ahead(
                (on_mesh(host, rows, self.batch, mesh, rules), behind)
                for host, behind in made
            )
            for batch, self.reached in sent:
                yield batch
        finally:
            made.stop()
            for lane in self._lanes:  # the thread may be waiting for one
                lane.close()
            made.close()


def merged(places: Sequence[Place]) -> Place:
    """The place of a run, of which each process knows its own lanes.

    All processes have taken the same batch last.
    """
    lanes = {lane: at for place in places for lane, at in place["lanes"].items()}
    return {"batch": places[0]["batch"], "lanes": lanes}
