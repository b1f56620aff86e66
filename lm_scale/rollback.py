# SPDX-License-Identifier: Apache-2.0
"""Going back: to a state from before the trouble, without the batches around it."""

from dataclasses import asdict

from lm_scale import distributed
from lm_scale.checkpoint import restore_newest
from lm_scale.config import RunConfig
from lm_scale.data.windows import Windows
from lm_scale.errors import Diverging
from lm_scale.guard import Trouble, after_rollback
from lm_scale.loop import Loop
from lm_scale.manifest import Manifest
from lm_scale.run_json import note, noted
from lm_scale.step import TrainState


def left_out_batches(config: RunConfig, found: Manifest | None) -> Windows:
    """The batches that the run leaves out, with the checkpoint that it goes on from.

    A rollback is noted in the run's folder at once: a run that is killed before its
    next checkpoint does not train on them again.
    """
    if found is None:
        return ()
    windows = distributed.from_first(noted(config.run_dir).get("left_out"))
    if windows is None:
        return found.left_out
    return tuple((first, stop) for first, stop in windows)


def check_may_roll_back(loop: Loop) -> None:
    """Diverging if the config allows for no rollback, or not for another one."""
    guard, what = loop.config.guard, describe(loop.trouble)
    if guard.policy != "rollback":
        raise Diverging(
            f"{what} Lower the learning rate, or let the run go back and leave these "
            f"batches out, by --guard.policy rollback."
        )
    if rollbacks(loop) >= guard.rollbacks:
        raise Diverging(
            f"{what} It was rolled back {guard.rollbacks} times already "
            f"(guard.rollbacks). Lower the learning rate."
        )


def roll_back(loop: Loop, target: TrainState) -> TrainState:
    """The last good state from before the trouble, whose batches are left out.

    Raises Diverging if there is no such state.
    """
    guard, trouble, what = loop.config.guard, loop.trouble, describe(loop.trouble)
    assert trouble is not None
    number = rollbacks(loop) + 1
    loop.watchdog.begin("rolling back")
    loop.saver.wait()
    found = restore_newest(
        loop.saver.folder, target, loop.metrics.print, last=trouble.first - 1
    )
    if found is None:
        raise Diverging(f"{what} There is no checkpoint from before to go back to.")
    state, manifest = found
    left_out = after_rollback(
        loop.left_out, trouble, checkpoint=manifest.step, window=guard.window
    )
    facts = {"left_out": left_out, "rollbacks": number}
    distributed.on_first(lambda: note(loop.config.run_dir, **facts))
    loop.go_back(manifest.step, left_out, manifest.stream)
    loop.metrics.log_rollback(manifest.step, {**asdict(trouble), "left_out": left_out})
    loop.metrics.print(
        f"WARNING: {what} Rolled back to step {manifest.step} (the {number}. of at "
        f"most {guard.rollbacks} times); the batches {list(left_out)} are left out for "
        f"good (from the first to before the second number)."
    )
    return state


def rollbacks(loop: Loop) -> int:
    """How often the run has gone back, in earlier processes too."""
    return distributed.from_first(noted(loop.config.run_dir).get("rollbacks", 0))


def describe(trouble: Trouble | None) -> str:
    assert trouble is not None
    return f"Steps {trouble.first} to {trouble.noticed}: {trouble.what}."
