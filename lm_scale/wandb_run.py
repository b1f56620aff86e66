# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, kept from stopping a run or waiting for anybody."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_scale.errors import one_line

# What wandb may wait for, unless the environment says otherwise: without a network it
# would hold up the start for 90 s and the end for ever.
WANDB_LIMITS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "120"}  # s


class WandbRun:
    """A run at Weights & Biases; a failure prints one note and switches it off.

    Its id lies in `run_dir/wandb_id`, with which a resumed run goes on in the same one.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any] | None,
        resumed: bool,
        note: Callable[[str], None],
    ):
        self.note = note
        self.run = None
        kept = run_dir / "wandb_id"
        with self._or_switch_off(), no_prompt():
            for name, limit in WANDB_LIMITS.items():
                os.environ.setdefault(name, limit)
            import wandb  # pyright: ignore[reportMissingImports]

            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "lm_scale",
                name=run_dir.resolve().name,
                dir=str(run_dir.resolve()),
                config=dict(config or {}),
                id=kept.read_text().strip() if resumed and kept.exists() else None,
                resume="allow",
            )
            kept.write_text(f"{self.run.id}\n")

    def log(self, scalars: dict[str, float], step: int) -> None:
        if self.run is not None:
            with self._or_switch_off():
                # A resumed run may make steps again; wandb has their values, and would
                # warn at each that it takes no older ones.
                if step >= self.run.starting_step:
                    self.run.log(scalars, step=step)

    def finish(self, failed: bool) -> None:
        if self.run is not None:
            with self._or_switch_off():
                self.run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _or_switch_off(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self.run = None
            reason = one_line(error, 200)
            self.note(f"wandb failed ({reason}): the run goes on without it.")


@contextlib.contextmanager
def no_prompt() -> Iterator[None]:
    """Hides the terminal's input: wandb then raises instead of asking for a login."""
    former, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = former
