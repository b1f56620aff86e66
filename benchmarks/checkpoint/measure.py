# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring 1.5 GB of state on 8 simulated devices: time and memory.

    python -m benchmarks.checkpoint.measure FOLDER

FOLDER is where the checkpoints and the plain file go (about 5 GB, removed at the end).
Each measurement is a process of its own, as memory peaks would mix.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["NPROC"] = str(max(16, os.cpu_count() or 1))
os.environ["JAX_PLATFORMS"] = "cpu"

REPEATS = 3
FSDP = {"fsdp": 8}
OTHERS = {
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp=4, on 4 devices": {"fsdp": 4},
    "1 device": {},
}


def make(sizes: dict[str, int]):
    """Mesh, model and optimizer of GPT-2 124M, cut over fsdp."""
    import math

    import jax

    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    from lm_scale.models import Compute, GPT2Config, build_model
    from lm_scale.optim import AdamW, Schedule, make_optimizer, make_schedule
    from lm_scale.sharding import PRESETS, MeshShape, make_mesh
    from lm_scale.step import decay_mask

    ones = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    mesh = make_mesh(MeshShape(**ones | sizes))
    # A vocabulary that every mesh here divides.
    config = GPT2Config(vocab=50304)
    model = build_model(config, Compute(rules=PRESETS["fsdp_tp"]))
    schedule = make_schedule(Schedule(), 1000)
    return mesh, model, make_optimizer(AdamW(), schedule, decay_mask(model))


def save(folder: Path) -> dict:
    """What saving costs, with a loop that computes meanwhile."""
    import jax
    import numpy as np

    from lm_scale.checkpoint import Saver
    from lm_scale.checkpoint_folder import CheckpointFolder
    from lm_scale.step import TrainState, init_state

    mesh, model, optimizer = make(FSDP)
    figures: dict[str, list] = {
        name: [] for name in ("copy_s", "blocked_s", "save_s", "write_s", "read_s")
    }
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(model, optimizer, 0))()
        jax.block_until_ready(state)
        leaves = jax.tree.leaves(state)
        size = sum(x.nbytes for x in leaves)
        advance = jax.jit(
            lambda s: TrainState(**vars(s) | {"step": s.step + 1}), donate_argnums=0
        )
        with Saver(CheckpointFolder(folder / "checkpoints"), keep=1) as saver:
            saver.save(state)  # compiles
            saver.wait()
            for _ in range(REPEATS):
                state = jax.block_until_ready(advance(state))
                start = time.perf_counter()
                parts = [
                    shard.data
                    for x in jax.tree.leaves(state)
                    for shard in x.addressable_shards
                    if shard.replica_id == 0
                ]
                copies = [np.array(part, copy=True) for part in parts]
                figures["copy_s"].append(time.perf_counter() - start)
                start = time.perf_counter()
                with open(folder / "plain", "wb") as file:
                    for copy in copies:
                        file.write(copy.data)
                    file.flush()
                    os.fsync(file.fileno())
                figures["write_s"].append(time.perf_counter() - start)
                start = time.perf_counter()
                with open(folder / "plain", "rb") as file:
                    while file.read(2**24):
                        pass
                figures["read_s"].append(time.perf_counter() - start)
                del copies, parts
                reset_peak()
                before = resident("VmRSS")
                start = time.perf_counter()
                saver.save(state)
                figures["blocked_s"].append(time.perf_counter() - start)
                saver.wait()
                figures["save_s"].append(time.perf_counter() - start)
                peak = resident("VmHWM") - before
    return {"bytes": size, **figures, "save_peak_bytes": peak}


def restore(folder: Path, sizes: dict[str, int]) -> dict:
    """Time and memory of restoring, the hashes included, onto a mesh."""
    import jax

    from lm_scale.checkpoint import restore_step
    from lm_scale.checkpoint_folder import CheckpointFolder
    from lm_scale.step import abstract_state

    mesh, model, optimizer = make(sizes)
    with jax.set_mesh(mesh):
        target = abstract_state(model, optimizer, mesh)
        times, peaks = [], []
        for _ in range(
            2
        ):  # the first compiles the hashes; the second reuses its memory
            reset_peak()
            before = resident("VmRSS")
            start = time.perf_counter()
            state, _ = restore_step(
                CheckpointFolder(folder / "checkpoints"), target, None
            )
            jax.block_until_ready(state)
            times.append(time.perf_counter() - start)
            held = sum(
                shard.data.nbytes
                for x in jax.tree.leaves(state)
                for shard in x.addressable_shards
            )
            peaks.append(resident("VmHWM") - before)
            del state
    return {"restore_s": times[1], "held_bytes": held, "peak_bytes": peaks[0]}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise ValueError(name)


def child(*arguments: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.checkpoint.measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        what = json.loads(sys.argv[2])
        print(json.dumps(save(folder) if what is None else restore(folder, what)))
        return
    folder.mkdir(parents=True)
    try:
        saved = child(str(folder), "null")
        print(json.dumps(saved, indent=1))
        for name, sizes in {"fsdp=8, as saved": FSDP, **OTHERS}.items():
            print(name, child(str(folder), json.dumps(sizes)), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
