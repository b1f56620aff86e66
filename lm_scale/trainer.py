# SPDX-License-Identifier: Apache-2.0
"""train(config): set up, restore, loop, evaluate, save, export."""

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from lm_scale import hf
from lm_scale.checkpoint import Checkpoints
from lm_scale.config import RunConfig, claim_run_dir, read_run
from lm_scale.data.corpus import documents
from lm_scale.data.loader import EvalBatches, TrainBatches, device_batches
from lm_scale.data.prepare import prepare
from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import load_tokenizer, train_tokenizer
from lm_scale.errors import InputError
from lm_scale.evaluate import evaluate, unigram_loss
from lm_scale.generate import Sampling, fill_masks, generate
from lm_scale.metrics import MetricsLogger
from lm_scale.models import Model, build_model, family_of
from lm_scale.objectives import Vocabulary
from lm_scale.optim import make_optimizer, make_schedule
from lm_scale.sharding import (
    FULLY_SHARDED,
    Params,
    abstract_params,
    check_divides,
    make_mesh,
    sharding_table,
)
from lm_scale.step import (
    TrainState,
    abstract_state,
    decay_mask,
    init_state,
    make_eval_step,
    make_train_step,
)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int  # updates made in all
    finished: bool  # False: stopped early, by a signal or `stop_at`
    interrupted: bool  # True: by a signal
    results: dict[str, float]  # eval_loss ..., empty unless finished


def train(config: RunConfig, console: Console | None = None) -> Outcome:
    """Trains as `config` says; goes on where a former call in its run_dir stopped.

    The run directory holds `config.json`, `data/`, `checkpoints/`, `metrics.jsonl`,
    `tensorboard/` and, at the end, `eval_results.json` and `hf/`, the exported model.
    Raises InputError, before any long work, for whatever the config has wrong.
    """
    console = console or Console()
    # 1. Check what can be checked without text, then claim the directory.
    config.check(jax.device_count())
    mesh = make_mesh(config.mesh)
    model = build_model(config.model, config.compute)
    rules = config.compute.rules
    check_divides(model, rules, mesh)
    if config.steps is not None:
        make_schedule(config.schedule, config.steps)
    claim_run_dir(config)

    # 2. Text -> tokenizer -> token stores -> batches.
    tokenizer = prepare_data(config, console)
    batches, held_out = open_batches(config, tokenizer)
    steps = config.total_steps(batches.examples)

    # 3. Model and optimizer: the state is restored if there is one, else made.
    schedule = make_schedule(config.schedule, steps)
    optimizer = make_optimizer(config.optimizer, schedule, decay_mask(model))
    train_step = make_train_step(
        model, optimizer, schedule, seed=config.seed, accumulate=config.accumulate
    )
    eval_step = make_eval_step(model)
    describe(config, model, mesh, batches, steps, console)
    with jax.set_mesh(mesh), Checkpoints(config.run_dir, keep=config.keep) as saved:
        state = first_state(config, model, optimizer, mesh, saved, console)

        # 4. The loop.
        metrics = MetricsLogger(
            Path(config.run_dir),
            start_step=int(state.step),
            total_steps=steps,
            tokens_per_step=config.batch * config.seq_len,
            flops_per_step=config.batch
            * config.seq_len
            * config.model.train_flops_per_token(config.seq_len),
            devices=list(mesh.devices.flat),
            enabled=jax.process_index() == 0,
        )

        def evaluated(params: Params) -> dict[str, float]:
            return evaluate(eval_step, params, held_out, mesh, rules)

        with metrics, stop_on_signals(metrics.print) as stop:
            last = min(steps, config.stop_at or steps)
            source = device_batches(
                batches, mesh, rules, start=int(state.step), stop=last
            )
            state = run_steps(
                config,
                state,
                source,
                steps,
                train_step,
                evaluated,
                metrics,
                saved,
                stop,
            )
            step = int(state.step)
            saved.save(state)
            if step < steps:
                saved.wait()
                metrics.print(
                    f"Stopped after step {step} of {steps}, saved. "
                    f"Run the same command to go on."
                )
                return Outcome(step, False, stop.is_set(), {})
            results = evaluated(state.params)
            if metrics.start_step < steps:  # or the line is there already
                metrics.log_eval(step, results)
        saved.wait()

        # 5. What was learnt, and where it is.
        store = TokenStore.open(Path(config.store_dir) / "train")
        results["unigram_loss"] = unigram_loss(store, held_out, config.model.vocab)
        hf.export(config.model, state.params, tokenizer, Path(config.run_dir) / "hf")
        text = sample_text(config, model, state.params, tokenizer)
    report(config, results, text, console)
    return Outcome(step, True, False, results)


def run_steps(
    config: RunConfig,
    state: TrainState,
    source: Iterator[dict[str, jax.Array]],
    steps: int,
    train_step,
    evaluated,
    metrics: MetricsLogger,
    saved: Checkpoints,
    stop: threading.Event,
) -> TrainState:
    """Steps until `source` ends or `stop` is set; evaluates and saves on the way."""
    step = int(state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def log(pending) -> None:
        if pending is not None:
            number, values = pending
            write = number % config.log_every == 0 or number == steps
            values = {name: float(value) for name, value in values.items()}
            metrics.log_step(number, values, write=write)

    for batch in source:
        state, values = train_step(state, batch)
        step += 1
        # The metrics of the step before are read only now, with this step under way,
        # so that the devices never wait for the host.
        log(pending)
        pending = (step, values)
        eval_now = config.eval_every and step % config.eval_every == 0 and step < steps
        save_now = config.save_every and step % config.save_every == 0
        if eval_now or save_now:
            log(pending)  # waits for the step: its time is the step's, not the pause's
            pending = None
            with metrics.pause():
                if save_now:
                    saved.save(state)
                if eval_now:
                    metrics.log_eval(step, evaluated(state.params))
        if stop.is_set():
            break
    log(pending)
    return state


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process."""
    stop, former = threading.Event(), {}

    def handle(number, frame):
        stop.set()
        for signal_number, handler in former.items():
            signal.signal(signal_number, handler)
        say("Stopping after this step; a second signal ends at once.")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# --- Set-up --------------------------------------------------------------------------


def prepare_tokenizer(config: RunConfig, console: Console):
    """The tokenizer of the run: the one in the store, the one named, or a new one."""
    folder = Path(config.store_dir) / "tokenizer"
    settings = config.data.tokenizer
    recipe = json.loads(json.dumps(dataclasses.asdict(config.data)))
    recipe = {name: recipe[name] for name in ("corpus", "tokenizer")}
    note = folder / "recipe.json"
    if note.exists():
        there = json.loads(note.read_text())
        if there != recipe:
            raise InputError(
                f"{folder} was made from {there}, this run asks for {recipe}. "
                f"Choose another `data.store`."
            )
        return load_tokenizer(folder)
    if settings.path is not None:
        tokenizer = load_tokenizer(settings.path)
    else:
        texts = documents(config.data.corpus, "train")
        console.print(f"Training a tokenizer of {settings.vocab_size} tokens ...")
        tokenizer = train_tokenizer(texts, settings, max_length=config.model.positions)
    tokenizer.save_pretrained(folder)
    note.write_text(json.dumps(recipe))  # last: the folder is whole
    return tokenizer


def prepare_data(config: RunConfig, console: Console):
    """Makes what is missing of tokenizer and token stores; returns the tokenizer.

    Raises InputError if the tokenizer does not fit the model or the objective.
    """
    tokenizer = prepare_tokenizer(config, console)
    size = len(tokenizer)
    if size > config.model.vocab:
        raise InputError(
            f"The tokenizer has {size} tokens, the model's embedding "
            f"{config.model.vocab} rows. Set `model.vocab` to {size} or more."
        )
    config.objective.check(vocabulary_of(tokenizer))
    prepare(
        config.data.corpus, tokenizer, config.store_dir,
        separator=config.data.separator, console=console,
    )  # fmt: skip
    return tokenizer


def vocabulary_of(tokenizer) -> Vocabulary:
    """What the objectives have to know of a tokenizer."""
    special = tuple(sorted(tokenizer.all_special_ids))
    return Vocabulary(len(tokenizer), special, tokenizer.mask_token_id)


def open_batches(config: RunConfig, tokenizer) -> tuple[TrainBatches, EvalBatches]:
    """The training and the held-out batches of a run whose stores exist."""
    options: dict[str, Any] = {
        "objective": config.objective,
        "vocabulary": vocabulary_of(tokenizer),
        "seq_len": config.seq_len,
        "batch": config.batch // config.accumulate,
        "seed": config.seed,
    }
    stores = Path(config.store_dir)
    held_out = EvalBatches(TokenStore.open(stores / "validation"), **options)
    options["batch"] = config.batch
    return TrainBatches(TokenStore.open(stores / "train"), **options), held_out


def first_state(
    config: RunConfig,
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    saved: Checkpoints,
    console: Console,
) -> TrainState:
    """The state to go on from. To be called under `jax.set_mesh`."""
    # Resuming goes before a warm start, a warm start before a cold one.
    if saved.latest() is not None:
        state = saved.restore(abstract_state(model, optimizer, mesh))
        console.print(f"Going on from step {int(state.step)} in {saved.directory}")
        return state
    make = jax.jit(lambda: init_state(model, optimizer, config.seed))
    if config.init_from is not None:
        found = hf.read_config(config.init_from)
        mine = dataclasses.asdict(config.model)
        wrong = [
            f"{name} = {value} there, {mine.get(name)} here"
            for name, value in dataclasses.asdict(found).items()
            if mine.get(name) != value and "dropout" not in name
        ]
        if wrong or type(found) is not type(config.model):
            raise InputError(
                f"The model in {config.init_from} ({type(found).__name__}) is not the "
                f"config's ({type(config.model).__name__}): {'; '.join(wrong)}."
            )
        weights = hf.read_params(config.init_from, model)
        target = abstract_params(model, config.compute.rules, mesh)
        params = jax.tree.map(
            lambda x, t: jax.device_put(x, t.sharding), weights, target
        )
        return dataclasses.replace(make(), params=params)
    return make()


def describe(
    config: RunConfig,
    model: Model,
    mesh: Mesh,
    batches: TrainBatches,
    steps: int,
    console: Console,
) -> None:
    """Prints each weight's sharding, then the run in four lines."""
    table = Table(
        "weight", "shape", "logical axes", "mesh axes", "bytes a device", box=None
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
    tokens = config.batch * config.seq_len
    console.print(
        f"model    {type(config.model).__name__}, {weights:,} weights\n"
        f"devices  {mesh.size} × {device.device_kind}, mesh {' '.join(sizes) or '1'}\n"
        f"data     {batches.store.num_tokens:,} training tokens, "
        f"{batches.examples:,} sequences of {config.seq_len}\n"
        f"run      {steps:,} steps of {tokens:,} tokens = "
        f"{steps * config.batch / batches.examples:.2f} epochs, in {config.run_dir}",
        highlight=False,
    )


# --- The end -------------------------------------------------------------------------


def sample_text(config: RunConfig, model: Model, params: Params, tokenizer) -> str:
    """The prompt continued (causal LM), or with its masks filled in (masked LM)."""
    if family_of(config.model).causal:
        prompt = np.array([tokenizer.encode(config.sample_prompt)], np.int32)
        room = config.model.positions - prompt.shape[1]
        if room < 1 or prompt.shape[1] == 0:
            return config.sample_prompt
        sampling = Sampling(max_new_tokens=min(80, room), seed=config.seed)
        ids = generate(model, params, prompt, sampling, eos_id=tokenizer.eos_token_id)
        return tokenizer.decode(ids[0], skip_special_tokens=True)
    ids = np.array([tokenizer.encode(config.sample_prompt)], np.int32)
    filled = fill_masks(model, params, ids, tokenizer.mask_token_id)
    text = tokenizer.decode(filled[0], skip_special_tokens=True)
    return f"{config.sample_prompt}  ->  {text}"


def report(
    config: RunConfig, results: dict[str, float], text: str, console: Console
) -> None:
    """Writes eval_results.json and prints the results and where everything is."""
    run_dir = Path(config.run_dir)
    named = {
        f"eval_{name}" if name != "unigram_loss" else name: value
        for name, value in results.items()
    }
    path = run_dir / "eval_results.json"
    path.write_text(json.dumps(named, indent=4, sort_keys=True) + "\n")
    table = Table(show_header=False)
    table.add_row("held-out loss", f"{results['loss']:.4f} nats a token")
    table.add_row("perplexity", f"{results['perplexity']:.2f}")
    table.add_row("accuracy", f"{results['accuracy']:.2%}")
    table.add_row("unigram loss", f"{results['unigram_loss']:.4f}, the same tokens")
    table.add_row("sample", text)
    table.add_row("checkpoint", str(run_dir / "checkpoints"))
    table.add_row("TensorBoard", str(run_dir / "tensorboard"))
    table.add_row("Hugging Face", str(run_dir / "hf"))
    console.print(table)


# --- A finished run, opened again ---------------------------------------------------


@dataclass(frozen=True)
class OpenRun:
    """A run's newest parameters, ready to be used under `jax.set_mesh(mesh)`."""

    config: RunConfig
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any


def open_run(run_dir: str) -> OpenRun:
    """Loads a run onto the devices there are, in its own mesh if that fits them."""
    config = read_run(run_dir)
    try:
        mesh = make_mesh(config.mesh)
    except InputError:  # trained on another number of devices
        mesh = make_mesh(FULLY_SHARDED)
    model = build_model(config.model, config.compute)
    check_divides(model, config.compute.rules, mesh)
    if not (Path(run_dir) / "checkpoints").is_dir():
        raise InputError(f"{run_dir} has no checkpoints yet. Train it first.")
    tokenizer = load_tokenizer(Path(config.store_dir) / "tokenizer")
    with Checkpoints(run_dir) as saved:
        target = abstract_params(model, config.compute.rules, mesh)
        params = saved.restore_params(target)
    return OpenRun(config, mesh, model, params, tokenizer)
