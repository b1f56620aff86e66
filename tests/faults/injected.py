# SPDX-License-Identifier: Apache-2.0
"""Runs `lm-scale ARGUMENTS` with a fault: python injected.py KIND@PLACE[:STEP] ...

KIND: kill, raise, wait (for ever), SIGTERM, SIGINT (which this process sends to
itself), twice (SIGTERM, and again), spike (of the loss, seen by this process alone).
PLACE: where and, with a step, when; see `arm`. On process 1, if there are two.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from lm_scale import __main__ as command_line
from lm_scale import manifest


def do(kind: str) -> None:
    print(f"fault: {kind}", file=sys.stderr, flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise RuntimeError("an error that was injected")
    elif kind == "wait":
        threading.Event().wait()
    elif kind == "twice":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()  # for the end
    else:
        os.kill(os.getpid(), getattr(signal, kind))


def wait_for_a_checkpoint() -> None:
    """Steps are faster here than the first save, which must have come to its end."""
    folder = Path(sys.argv[3]).parent / "run" / "checkpoints"
    while not list(folder.glob("[0-9]*/commit_success.txt")):
        time.sleep(0.01)


def arm(kind: str, place: str, step: int) -> None:
    """Puts the fault in its place."""
    if os.environ.get("LM_SCALE_PROCESS_ID", "1") != "1":
        return
    from orbax.checkpoint import CompositeCheckpointHandler

    from lm_scale import assemble
    from lm_scale.checkpoint_folder import CheckpointFolder

    make_step, write, delete = (
        assemble.make_train_step, manifest.write, CheckpointFolder.delete,
    )  # fmt: skip

    def make_train_step(*given, **named):
        real, calls = make_step(*given, **named), []

        def train_step(state, batch):
            calls.append(int(state.step))
            # Before the first step has returned is as in a long compilation.
            if place == "compile" and len(calls) == 1:
                do(kind)
                threading.Event().wait(60)
            now = place == "step" and calls[-1] == step
            if now and kind == "spike":
                state, values = real(state, batch)
                again = calls.count(step) > 1
                return state, values | {"loss": values["loss"] + 3.0 * (not again)}
            if now:
                wait_for_a_checkpoint()
                do(kind)
            return real(state, batch)

        return train_step

    def write_manifest(filled, folder):
        if place == "unsealed" and filled.step == step:  # all data, no manifest
            do(kind)
        write(filled, folder)
        if place == "sealed" and filled.step == step:  # whole, but without its name
            do(kind)

    def delete_half(self, old):
        if place == "deletion" and old == step:
            path = (self / old).rename(self.path / f"{old}.deleting")
            next(path.glob("params/*")).rename(path / "gone")
            do(kind)
        delete(self, old)

    class Write:
        """One of those that the background waits for."""

        def result(self, timeout=None):
            do(kind)

    async def async_save(self, *given, **named):
        saves.append(1)
        writes = list(await real_save(self, *given, **named) or [])
        if place == "saving" and len(saves) == 1:
            writes.append(Write())
        return writes

    saves, real_save = [], CompositeCheckpointHandler.async_save
    CompositeCheckpointHandler.async_save = async_save
    assemble.make_train_step = make_train_step
    manifest.write = write_manifest
    CheckpointFolder.delete = delete_half


if __name__ == "__main__":
    fault, arguments = sys.argv[1], sys.argv[2:]
    kind, _, where = fault.partition("@")
    place, _, step = where.partition(":")
    arm(kind, place, int(step or 0))
    sys.exit(command_line.main(arguments))
