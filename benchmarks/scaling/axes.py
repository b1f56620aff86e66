# SPDX-License-Identifier: Apache-2.0
"""The train step under Explicit and under Auto axes, compiled for a slice of TPUs.

    python -m benchmarks.scaling.axes --check          # both compute the same, on CPU
    python -m benchmarks.scaling.axes gpt2 --topology v5e:2x4

Prints a table as in README.md: estimated cycles, memory and collectives of one step of
one device. Needs no TPU, but libtpu (`pip install "jax[tpu]"`), and about a minute a
program.
"""

import argparse
import dataclasses
import itertools
import os
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "NPROC": "16"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from benchmarks.scaling import auto  # noqa: E402
from lm_scale.models import (  # noqa: E402
    Compute,
    GPT2Config,
    LlamaConfig,
    build_model,
)
from lm_scale.models.kernels import choose_attention  # noqa: E402
from lm_scale.optim import (  # noqa: E402
    AdamW,
    Schedule,
    make_optimizer,
    make_schedule,
)
from lm_scale.planning.program import Program, read  # noqa: E402
from lm_scale.sharding import (  # noqa: E402
    flatten,
    make_mesh,
    parse_mesh_shape,
)
from lm_scale.step import (  # noqa: E402
    abstract_state,
    decay_mask,
    init_state,
    make_train_step,
)

DROPOUTS = ("embed_dropout", "attention_dropout", "residual_dropout")
MODELS = {
    # Its vocabulary filled up to what 8 devices divide.
    "gpt2": GPT2Config(vocab=50_304, **dict.fromkeys(DROPOUTS, 0.0)),
    "llama": LlamaConfig(),
    # Wide enough for 8 parts of 128, the lanes of a TPU.
    "gpt2-1024": GPT2Config(
        vocab=50_304, embed=1024, heads=16, mlp=4096, **dict.fromkeys(DROPOUTS, 0.0)
    ),
}
ROWS, LENGTH = 64, 1024
LAYOUTS = (  # mesh, parts of the batch
    ("data=8", 1),
    ("data=8", 4),
    ("fsdp=8", 1),
    ("fsdp=4,tensor=2", 1),
    ("fsdp=4,tensor=2", 4),
)
# XLA splits a product with a cut weight into a loop that multiplies by a part while the
# next one is on its way; a common setting of programs under Auto axes forbids that.
UNSPLIT = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
STEPS = {  # Explicit axes?, the type in which ours sums gradients, XLA's options
    "Explicit": (True, "float32", {}),
    "Explicit, bf16 sums": (True, "bfloat16", {}),
    "Auto": (False, "float32", {}),
    "Auto, unsplit": (False, "float32", UNSPLIT),
}


def parts(config, compute: Compute, mesh, accumulate: int):
    """The model, its optimizer and our train step."""
    kernel, _ = choose_attention(
        compute, config, mesh, length=LENGTH, causal=True, segments=False
    )
    model = build_model(config, dataclasses.replace(compute, attention=kernel))
    schedule = make_schedule(Schedule(warmup=0), 100)
    optimizer = make_optimizer(AdamW(clip=1.0), schedule, decay_mask(model))
    step = make_train_step(model, optimizer, schedule, seed=0, accumulate=accumulate)
    return model, optimizer, step


def compile_step(
    config, compute: Compute, mesh, accumulate: int, *, explicit: bool,
    rows: int = ROWS, length: int = LENGTH, options: dict[str, str] | None = None,
):  # fmt: skip
    """The compiled step for the mesh's devices, of which there need be none."""
    model, optimizer, step = parts(config, compute, mesh, accumulate)
    state = abstract_state(model, optimizer, mesh)

    def tokens(mesh):
        cut = NamedSharding(mesh, compute.rules.spec("batch", "seq"))
        return jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=cut)

    if explicit:
        with jax.set_mesh(mesh):
            ids = tokens(mesh)
            return step.lower(state, {"tokens": ids, "labels": ids}).compile(options)
    mesh = auto.auto_mesh(mesh)
    shardings = auto.on_mesh(state, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state, shardings,
    )  # fmt: skip
    step = auto.make_train_step(model, optimizer, shardings, accumulate=accumulate)
    with jax.set_mesh(mesh), auto.auto_layout():
        ids = tokens(mesh)
        return step.lower(state, {"tokens": ids, "labels": ids}).compile(options)


def check() -> None:
    """Both steps compute the same on 8 simulated devices, but for rounding (f32)."""
    shape = {"vocab": 64, "positions": 16, "layers": 3, "embed": 32, "heads": 4,
             "mlp": 48}  # fmt: skip
    small = {"kv_heads": 2, "head_dim": 8}
    compute = Compute(dtype="float32", loss_chunk=8)
    ids = np.random.default_rng(0).integers(0, 64, (32, 16)).astype(np.int32)
    for name, (layout, accumulate) in itertools.product(("gpt2", "llama"), LAYOUTS):
        settings = shape | (small if name == "llama" else {})
        config = dataclasses.replace(MODELS[name], **settings)
        mesh = make_mesh(parse_mesh_shape(layout))
        model, optimizer, step = parts(config, compute, mesh, accumulate)
        rows = compute.rules.spec("batch", "seq")
        with jax.set_mesh(mesh):
            state = jax.jit(lambda m=model, o=optimizer: init_state(m, o, 0))()
            copy = jax.tree.map(np.asarray, state)
            batch = jax.device_put(ids, NamedSharding(mesh, rows))
            after, metrics = step(state, {"tokens": batch, "labels": batch})
        shardings = auto.on_mesh(abstract_state(model, optimizer, mesh),
                                 auto.auto_mesh(mesh))  # fmt: skip
        step = auto.make_train_step(model, optimizer, shardings, accumulate=accumulate)
        with jax.set_mesh(auto.auto_mesh(mesh)), auto.auto_layout():
            batch = jax.device_put(ids, rows)
            other, others = step(
                jax.device_put(copy, shardings), {"tokens": batch, "labels": batch}
            )
        for key in others:
            np.testing.assert_allclose(others[key], metrics[key], rtol=2e-5)
        # Adam's first step is the learning rate times the sign of the gradient, but
        # where that is rounding noise, so the first moment is compared as well.
        first, second = (
            flatten(s.opt_state[1][0].mu) for s in (after, other)
        )  # the gradients, times 1 - beta1
        for path in first:
            np.testing.assert_allclose(
                first[path], second[path], rtol=1e-3, atol=1e-6, err_msg=path
            )
        print(f"{name} {layout} in {accumulate}: loss {float(metrics['loss']):.6f},"
              f" {float(others['loss']):.6f}", flush=True)  # fmt: skip


def line(title: str, compiled, mesh) -> tuple[str, Program]:
    program = read(compiled.as_text(), dict(mesh.shape))
    memory = compiled.memory_analysis()
    cells = [title, f"{program.cycles / 1e6:.1f}",
             f"{memory.peak_memory_in_bytes / 2**30:.2f}",
             f"{program.sent / 1e6:.0f}"]  # fmt: skip
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
                 "collective-permute"):  # fmt: skip
        one = program.of_kind(kind)
        cells.append(f"{one.count}: {one.size / 1e6:.0f}" if one.count else "–")
    return "| " + " | ".join(cells) + " |", program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # []: what argparse of Python 3.11 compares with the choices if none is given.
    parser.add_argument("models", nargs="*", choices=[*MODELS, []])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--arrays", action="store_true", help="list all collectives")
    parser.add_argument("--step", action="append", choices=STEPS, help="only this one")
    parser.add_argument("--texts", type=Path, help="a folder for the compiled texts")
    parser.add_argument(
        "--layout", action="append", help="only this one: fsdp=8/1, say"
    )
    options = parser.parse_args()
    if options.check:
        check()
    slice_of = topologies.get_topology_desc
    for name in options.models:
        devices = slice_of(platform="tpu", topology_name=options.topology).devices
        for layout, accumulate in LAYOUTS:
            if options.layout and f"{layout}/{accumulate}" not in options.layout:
                continue
            mesh = make_mesh(parse_mesh_shape(layout), devices)
            for title in options.step or STEPS:
                explicit, wire, settings = STEPS[title]
                compute = Compute(grad_dtype=wire, loss_chunk=128)
                compiled = compile_step(
                    MODELS[name], compute, mesh, accumulate,
                    explicit=explicit, options=settings,
                )  # fmt: skip
                label = f"{name} {layout} in {accumulate} | {title}"
                if options.texts:
                    name_of = label.replace(" | ", " ").replace(" ", "_")
                    path = options.texts / f"{name_of}_{options.topology}.txt"
                    path.write_text(compiled.as_text())
                text, program = line(label, compiled, mesh)
                print(text, flush=True)
                if options.arrays:
                    for *key, count in sorted(program.arrays):
                        print("   ", count, *key, flush=True)


if __name__ == "__main__":
    main()
