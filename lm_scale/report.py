# SPDX-License-Identifier: Apache-2.0
"""What a run tells a person before its first step and after its last."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lm_scale.config import RunConfig
from lm_scale.console import say
from lm_scale.data.examples import Source
from lm_scale.data.loader import TrainBatches
from lm_scale.data.mixed import Mixed, stores_of
from lm_scale.data.streamed import StreamedBatches
from lm_scale.models import Model
from lm_scale.sharding import LOGICAL_AXES, Rules, sharding_table


def rules_table(rules: Mapping[str, Rules]) -> Table:
    """One row a logical axis, one column for each of the rules: their mesh axes."""
    names = [Column(name, no_wrap=True) for name in ("logical axis", *rules)]
    table = Table(*names, box=None, padding=(0, 1, 0, 0))
    for axis in LOGICAL_AXES:
        cells = [" ".join(getattr(chosen, axis)) or "-" for chosen in rules.values()]
        table.add_row(axis, *cells)
    return table


def describe(
    config: RunConfig,
    model: Model,
    mesh: Mesh,
    batches: TrainBatches | StreamedBatches,
    steps: int,
    console: Console,
) -> None:
    """Prints each weight's sharding, then the run in five lines."""
    table = Table(
        Column("weight", no_wrap=True, min_width=18),
        "shape",
        "logical axes",
        "mesh axes",
        "bytes a device",
        box=None,
    )
    rows = sharding_table(model, config.compute.rules, mesh)
    for row in rows:
        shape = "×".join(map(str, row.shape))
        axes = " ".join(axis or "-" for axis in row.axes)
        parts = " ".join(
            "-" if part is None else part if isinstance(part, str) else "×".join(part)
            for part in row.mesh_axes
        )
        table.add_row(row.path, shape, axes, parts, f"{row.bytes_per_device:,}")
    console.print(table)
    weights = sum(math.prod(row.shape) for row in rows)
    sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    device = mesh.devices.flat[0]
    tokens = round(config.batch * batches.mean_length)
    _, attention = config.choose_attention(mesh)
    shape = " ".join(sizes) or "1"
    say(
        console,
        f"model      {type(config.model).__name__}, {weights:,} weights\n"
        f"devices    {mesh.size} × {device.device_kind}, mesh {shape}\n"
        f"attention  {attention}\n"
        f"data       {_data(config, batches)}\n"
        f"run        {steps:,} steps of {tokens:,} tokens{_epochs(batches, steps)}, in "
        f"{config.run_dir}",
    )
    if config.schedule.warmup >= steps:
        say(
            console,
            f"Note: the warm-up of {config.schedule.warmup:,} steps does not end in "
            f"the run's {steps:,}: the learning rate never reaches its peak.",
        )


def _data(config: RunConfig, batches: TrainBatches | StreamedBatches) -> str:
    if isinstance(batches, StreamedBatches):
        return (
            f"{batches.shards.source}, streamed from {batches.shards.count:,} shard(s) "
            f"in {batches.lanes} lane(s), sequences of {config.seq_len}"
        )
    texts = f"sequences of {config.seq_len}"
    if config.data.examples == "documents":
        texts = f"documents of {batches.mean_length:.1f} on average"
    if config.data.examples == "packed":
        texts += f", {batches.mean_length / config.seq_len:.1%} of them tokens"
    return f"{tokens_of(batches.source)}, {batches.examples:,} {texts}"


def _epochs(batches: TrainBatches | StreamedBatches, steps: int) -> str:
    seen = batches.epochs(steps).items()
    text = ", ".join(f"{name} {x:.2f} epochs".lstrip() for name, x in seen)
    return f" = {text}" if seen else ""


def tokens_of(source: Source | Mixed) -> str:
    """How many tokens there are; of a mixture, also of each source, with its share."""
    stores = stores_of(source)
    total = sum(store.num_tokens for store, _ in stores.values())
    text = f"{total:,} training tokens"
    if not isinstance(source, Mixed):
        return text
    each = [f"{share:.1%} from the {store.num_tokens:,} of {name}"
            for name, (store, share) in stores.items()]  # fmt: skip
    return f"{text} ({', '.join(each)})"


def report(
    config: RunConfig, results: dict[str, float], sample: str | None, console: Console
) -> None:
    """Writes eval_results.json and prints the results and where everything is.

    No results: the run was not evaluated, and no file is written.
    """
    run_dir, table = Path(config.run_dir), Table(show_header=False)
    if results:
        write_results(results, run_dir / "eval_results.json")
        table.add_row("held-out loss", f"{results['loss']:.4f} nats a token")
        table.add_row("perplexity", f"{results['perplexity']:.2f}")
        table.add_row("accuracy", f"{results['accuracy']:.2%}")
    if "unigram_loss" in results:
        unigram = f"{results['unigram_loss']:.4f}, the same tokens"
        table.add_row("unigram loss", unigram)
    # As Text: brackets in them are no markup.
    if sample is not None:
        table.add_row("sample", Text(sample))
    if (run_dir / "checkpoints").exists():
        table.add_row("checkpoint", Text(str(run_dir / "checkpoints")))
    if any(run_dir.glob("events.out.tfevents.*")):
        table.add_row("TensorBoard", Text(str(run_dir)))
    if any(run_dir.glob("model*.safetensors")):
        table.add_row("Hugging Face", Text(str(run_dir)))
    console.print(table)


def write_results(results: dict[str, float], path: Path) -> None:
    """As the old scripts wrote them: eval_loss, eval_perplexity, eval_accuracy ..."""
    named = {
        f"eval_{name}" if name != "unigram_loss" else name: value
        for name, value in results.items()
    }
    named = {name: x if math.isfinite(x) else None for name, x in named.items()}
    path.write_text(json.dumps(named, indent=4, sort_keys=True) + "\n")
