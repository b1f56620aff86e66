# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the train state on disk, through Orbax, asynchronously and in shards.

A checkpoint is `<run_dir>/checkpoints/<step>/` with three items: `params` and
`opt_state` (arrays) and `meta` (JSON: the step, the versions). The folder gets its name
only when all is written, so one that is listed is whole.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm_scale import __version__
from lm_scale.errors import InputError, differences, one_line
from lm_scale.sharding import Params
from lm_scale.step import TrainState

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


def has_checkpoints(run_dir: Path | str) -> bool:
    """If a run has saved anything; looks at the folder only."""
    folder = Path(run_dir) / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run; a context manager, as leaving waits for writes."""

    def __init__(
        self,
        run_dir: Path | str,
        *,
        keep: int | None = None,
        tokens: dict[str, Any] | None = None,
    ):
        """For reading only the first argument is needed.

        keep: so many of the newest stay on disk; None: all.
        tokens: fingerprint of the training tokens, which goes into each checkpoint.
        """
        self.tokens = tokens
        self.directory = Path(run_dir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *exception) -> None:
        # After a failure of one process it would wait for others that may be dead.
        if kind is None or jax.process_count() == 1:
            self.manager.close()  # waits

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts to write the state; returns when it is copied and may be donated."""
        step = int(state.step)
        if step == self.latest():
            return
        versions = {name: version(name) for name in LIBRARIES}
        versions["lm_scale"] = __version__
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(
                    {
                        "step": step,
                        "skipped": int(state.skipped),
                        "versions": versions,
                        "tokens": self.tokens,
                    }
                ),
            ),
        )

    def wait(self) -> None:
        """Until all that was saved is on disk; raises if it could not be written."""
        self.manager.wait_until_finished()

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (None: the newest).

        `target` is abstract and says where each shard goes.
        Raises InputError if it was trained on other tokens than `tokens` says.
        """
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(target.params),
            opt_state=ocp.args.StandardRestore(target.opt_state),
            meta=ocp.args.JsonRestore(),
        )
        found = differences(restored["meta"]["tokens"] or {}, self.tokens or {})
        if found:
            raise InputError(
                f"The checkpoints in {self.directory} were trained on other tokens "
                f"({'; '.join(found)}). Restore the token store that they belong to."
            )
        number = jax.device_put(restored["meta"]["step"], target.step.sharding)
        number = number.astype(target.step.dtype)
        skipped = restored["meta"].get("skipped", 0)  # checkpoints of 0.1 have none
        skipped = jax.device_put(skipped, target.skipped.sharding)
        skipped = skipped.astype(target.skipped.dtype)
        return TrainState(number, skipped, restored["params"], restored["opt_state"])

    def restore_params(self, target: Params, step: int | None = None) -> Params:
        """The parameters alone, of a step (None: the newest)."""
        return self._restore(step, params=ocp.args.StandardRestore(target))["params"]

    def _restore(self, step: int | None, **items: Any) -> Any:
        """These items of a checkpoint; InputError if it is missing or damaged."""
        step = self.newest() if step is None else step
        if step not in self.manager.all_steps():
            raise InputError(
                f"There is no checkpoint of step {step} in {self.directory}; "
                f"there are {', '.join(map(str, self.manager.all_steps()))}."
            )
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except (KeyError, ValueError, OSError) as error:
            older = [number for number in self.manager.all_steps() if number < step]
            way_out = f"go on from step {max(older)}" if older else "start anew"
            raise InputError(
                f"The checkpoint {self.directory / str(step)} is damaged, or of "
                f"another model: {one_line(error):.200}\n"
                f"Move that folder away to {way_out}."
            ) from error

    def newest(self) -> int:
        """The newest step; InputError if there is none."""
        step = self.latest()
        if step is None:
            raise InputError(
                f"There is no checkpoint in {self.directory}. Train first."
            )
        return step
