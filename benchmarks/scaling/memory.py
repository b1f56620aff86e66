# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a device over `fsdp` = 1, 2, 4, 8, by the compiler and by theory.

    python -m benchmarks.scaling.memory           # writes memory.json
    python -m benchmarks.scaling.memory --plot    # makes memory.png of it (matplotlib)

Compiles the train step of a Llama of 125 M weights for 8 TPU v5e chips, of which there
need be none.
"""

import argparse
import json
import os
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from jax.experimental import topologies  # noqa: E402

from benchmarks.scaling.axes import compile_step  # noqa: E402
from lm_scale.models import Compute, LlamaConfig  # noqa: E402
from lm_scale.sharding import MeshShape, make_mesh  # noqa: E402

HERE = Path(__file__).parent
MODEL, COMPUTE = LlamaConfig(), Compute(loss_chunk=128)
DEVICES, LENGTH = 8, 2048  # one row of the batch a device
F32, BF16 = 4, 2  # bytes


def theory(fsdp: int) -> dict[str, float]:
    """Bytes of a device by what they are for; the formula is explained in README.md."""
    c = MODEL
    queries, keys = c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim
    block = c.embed * (2 * queries + keys + 3 * c.mlp)
    table = c.vocab * c.embed  # the embedding; the output matrix is as large
    weights = c.layers * block + 2 * table
    # Outputs of matrix products, and what enters the layer.
    kept = c.embed + queries + keys + c.embed + 2 * c.mlp + c.embed
    return {
        "weights and AdamW's moments": 3 * F32 * weights / fsdp,
        "gradients, where weights are": F32 * (c.layers * block + table) / fsdp,
        "output matrix and its gradient, whole": (F32 + BF16) * table,
        "one block, whole": BF16 * block,
        "activations": BF16 * kept * c.layers * LENGTH,
        "logits of a chunk and their gradient": 2 * F32 * COMPUTE.loss_chunk * c.vocab,
    }


def measure() -> list[dict[str, int]]:
    """What the compiler says, for each `fsdp`; the rest of the mesh is `data`."""
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    rows = []
    for fsdp in (1, 2, 4, 8):
        mesh = make_mesh(MeshShape(data=-1, fsdp=fsdp), described.devices)
        compiled = compile_step(
            MODEL, COMPUTE, mesh, 1, explicit=True, rows=DEVICES, length=LENGTH
        )
        memory = compiled.memory_analysis()
        rows.append({
            "fsdp": fsdp,
            "peak": memory.peak_memory_in_bytes,
            "state": memory.argument_size_in_bytes,
        })  # fmt: skip
        expected = sum(theory(fsdp).values())
        print(f"fsdp={fsdp}: state {memory.argument_size_in_bytes / 2**30:.3f} GiB, "
              f"peak {memory.peak_memory_in_bytes / 2**30:.3f} GiB, "
              f"theory {expected / 2**30:.3f} GiB", flush=True)  # fmt: skip
    return rows


def plot(rows: list[dict[str, int]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    labels = [str(row["fsdp"]) for row in rows]
    below = [0.0] * len(rows)
    for part in theory(1):
        sizes = [theory(row["fsdp"])[part] / 2**30 for row in rows]
        axes.bar(labels, sizes, 0.6, bottom=below, label=f"theory: {part}")
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    peaks = [row["peak"] / 2**30 for row in rows]
    axes.plot(labels, peaks, "kD", label="compiled: peak")
    axes.set_xlabel("fsdp (devices that share the weights; data = 8 / fsdp)")
    axes.set_ylabel("memory of a device (GiB)")
    axes.set_title("Llama, 125 M weights, a row of 2048 tokens a device, TPU v5e:2x4")
    axes.legend(fontsize="small")
    figure.savefig(HERE / "memory.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="of what memory.json holds")
    path = HERE / "memory.json"
    if parser.parse_args().plot:
        plot(json.loads(path.read_text()))
    else:
        path.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
