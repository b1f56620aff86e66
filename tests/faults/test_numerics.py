# SPDX-License-Identifier: Apache-2.0
"""Numbers that go wrong: left out, rolled back, or traced to a device."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from rich.console import Console
from tiny import causal_run

from lm_scale import loop
from lm_scale.__main__ import main
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.config import RunConfig
from lm_scale.errors import Diverging
from lm_scale.guard import Guard
from lm_scale.replicas import Replicas
from lm_scale.run_json import read_run
from lm_scale.sharding import MeshShape
from lm_scale.step import TrainState
from lm_scale.trainer import train

QUIET = Console(quiet=True)
STEPS = 40


def lines(config: RunConfig, kind: str = "train") -> list[dict]:
    text = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def tiny_run(folder: Path, **changes) -> RunConfig:
    return causal_run(folder, **{
        "steps": STEPS, "save_every": 10, "keep": None, "eval_every": None,
        "eval_at_end": False, "sample_prompt": None, "report_to": (), **changes,
    })  # fmt: skip


def spoil(monkeypatch, bad, spoilt) -> list[int]:
    """Makes what training reads of some batches bad; the numbers of those trained on.

    bad: the batch's number -> whether to call `spoilt(state, values)` after its step.
    """
    numbers: list[int] = []
    batches, make = loop.device_batches, None

    def device_batches(source, *given, start, stop, left_out=()):
        from lm_scale.data.windows import batch_number

        made = batches(source, *given, start=start, stop=stop, left_out=left_out)
        for step, batch in enumerate(made, start):
            numbers.append(batch_number(step, left_out))
            yield batch

    from lm_scale import assemble

    make = assemble.make_train_step

    def make_train_step(*given, **named):
        real = make(*given, **named)

        def train_step(state, batch):
            state, values = real(state, batch)
            if bad(numbers[-1]):
                state, values = spoilt(state, dict(values))
            return state, values

        return train_step

    monkeypatch.setattr(loop, "device_batches", device_batches)
    monkeypatch.setattr(assemble, "make_train_step", make_train_step)
    return numbers


def higher(state, values):
    return state, values | {"loss": values["loss"] + 3.0}


def not_made(state, values):
    return state, values | {"loss": jnp.nan * values["loss"], "skipped": jnp.float32(1)}


GUARD = Guard(policy="rollback", window=4, patience=3, rollbacks=2)


def test_a_spike_is_rolled_back_and_its_batches_left_out(tmp_path, monkeypatch, capfd):
    numbers = spoil(monkeypatch, lambda n: n == 34, higher)
    config = tiny_run(tmp_path, guard=GUARD)
    assert train(config, Console(width=300)).finished
    # Noticed one step late: the 35th batch was under way, the 36th not begun.
    assert numbers == [*range(36), 30, *range(35, 44)]
    shown = " ".join(capfd.readouterr().out.split())
    assert "WARNING: Steps 35 to 35: the loss of" in shown
    assert "Rolled back to step 30 (the 1. of at most 2 times)" in shown
    assert [line["step"] for line in lines(config)] == list(range(1, STEPS + 1))
    (note,) = lines(config, "rollback")
    assert (note["step"], note["first"], note["noticed"]) == (30, 35, 35)
    assert note["left_out"] == [[31, 35]]
    # It is in each later checkpoint, so that a resumed run leaves them out too.
    folder = CheckpointFolder(config.checkpoints)
    assert folder.manifest(STEPS).left_out == ((31, 35),)
    assert folder.manifest(30).left_out == ()


def test_a_rollback_can_be_had_again(tmp_path, monkeypatch):
    """And a run that is stopped after it and resumed is the same."""
    spoil(monkeypatch, lambda n: n == 34, higher)
    once = tiny_run(tmp_path / "once", guard=GUARD)
    train(once, QUIET)
    twice = tiny_run(tmp_path / "twice", guard=GUARD)
    train(dataclasses.replace(twice, stop_at=37), QUIET)
    train(twice, QUIET)
    assert [x["loss"] for x in lines(twice)] == [x["loss"] for x in lines(once)]


def test_updates_skipped_in_a_row_are_rolled_back(tmp_path, monkeypatch):
    numbers = spoil(monkeypatch, lambda n: n in (12, 13, 14), not_made)
    config = tiny_run(tmp_path, guard=GUARD)
    assert train(config, QUIET).finished
    (note,) = lines(config, "rollback")
    assert (note["step"], note["first"], note["noticed"]) == (10, 13, 15)
    assert note["left_out"] == [[11, 15]] and numbers[-1] == 43


def test_rollbacks_have_an_end(tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, lambda n: n >= 12, not_made)
    config = tiny_run(tmp_path, guard=GUARD)
    with pytest.raises(
        Diverging, match="rolled back 2 times already .guard.rollbacks.. Lower"
    ):
        train(config, QUIET)
    folder = CheckpointFolder(config.checkpoints)
    assert max(folder.steps()) == 10  # none of what came after is a good one


def test_without_rollback_it_ends(tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, lambda n: n >= 12, not_made)
    path = tmp_path / "config.py"
    path.write_text(
        "from pathlib import Path\nfrom tiny import causal_run\n"
        f"config = causal_run(Path({str(tmp_path)!r}), steps=40, save_every=10)\n"
    )
    assert main(["train", str(path), "--guard.patience", "3"]) == 1
    shown = capfd.readouterr().err
    assert "Steps 13 to 15: 3 updates in a row had a loss or gradients not" in shown
    assert "--guard.policy rollback" in shown and "Traceback" not in shown
    assert CheckpointFolder(read_run(tmp_path / "run").checkpoints).steps() == [10]


# --- Silent corruption ----------------------------------------------------------------


def flipped(x: jax.Array, device: int) -> jax.Array:
    """The array with one bit flipped in the copy that one device holds."""
    parts = []
    for number, shard in enumerate(x.addressable_shards):
        data = np.array(shard.data)
        if number == device:
            data.reshape(-1).view(np.uint32)[5] ^= 1
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@pytest.mark.parametrize(
    ("sizes", "spec", "device", "named"),
    [
        ((8,), jax.P(), 3, ["TFRT_CPU_3"]),
        # Two copies of each half: which of them is right, nobody knows.
        ((2, 4), jax.P(None, "fsdp"), 1, ["TFRT_CPU_1", "TFRT_CPU_5"]),
    ],
)
def test_the_device_that_differs_is_named(sizes, spec, device, named):
    types = (AxisType.Explicit,) * len(sizes)
    mesh = jax.make_mesh(sizes, ("data", "fsdp")[: len(sizes)], axis_types=types)
    x = jax.device_put(np.ones((16, 24), np.float32), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        replicas = Replicas(2)
        replicas.ask(6, {"w": x})
        replicas.read()
        replicas.ask(7, {"w": flipped(x, device)})
        replicas.read()  # nothing was asked: it is not every step
        replicas.ask(8, {"a": x, "w": flipped(x, device)})
        with pytest.raises(Diverging) as error:
            replicas.read()
    text = str(error.value)
    assert "After step 8, copies of the same weights differ" in text
    devices = [jax.devices()[int(name.rpartition("_")[2])] for name in named]
    listed = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert listed == [f"w: {device} of process 0" for device in devices]


def test_weights_without_a_copy_are_not_compared():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    spread = NamedSharding(mesh, jax.P("fsdp"))
    x = jax.device_put(np.ones((16, 24), np.float32), spread)
    with jax.set_mesh(mesh):
        replicas = Replicas(1)
        replicas.ask(1, {"w": flipped(x, 3)})
        replicas.read()


@pytest.mark.parametrize(
    ("every", "step"),
    [(3, 12), (None, 12)],  # asked for; and in any case when it would be saved
)
def test_a_corrupt_copy_is_found_and_gets_into_no_checkpoint(
    every, step, tmp_path, monkeypatch
):
    def corrupted(state, values):
        params = dict(state.params)
        blocks = dict(params["blocks"])
        blocks["norm1"] = jax.tree.map(lambda x: flipped(x, 2), blocks["norm1"])
        params["blocks"] = blocks
        return TrainState(**vars(state) | {"params": params}), values

    spoil(monkeypatch, lambda n: n == 10, corrupted)
    config = tiny_run(
        tmp_path, save_every=4, mesh=MeshShape(data=8),
        guard=Guard(check_replicas=every),
    )  # fmt: skip
    with pytest.raises(Diverging, match=rf"After step {step}, .*\n  .*blocks\.norm1"):
        train(config, QUIET)
    assert CheckpointFolder(config.checkpoints).steps() == [4, 8]
