# SPDX-License-Identifier: Apache-2.0
"""train(config): set up, restore, loop, evaluate, save, export."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from lm_scale import hf
from lm_scale.checkpoint import Checkpoints
from lm_scale.config import RunConfig, check_run_dir, write_config
from lm_scale.data.loader import EvalBatches, device_batches
from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError, differences
from lm_scale.evaluate import evaluate, unigram_loss
from lm_scale.generate import Sampling, complete
from lm_scale.metrics import MetricsLogger
from lm_scale.models import Model, build_model
from lm_scale.optim import make_optimizer, make_schedule
from lm_scale.report import describe, report
from lm_scale.runs import open_batches, prepare_data
from lm_scale.sharding import Params, abstract_params, check_divides, make_mesh
from lm_scale.step import (
    TrainState,
    abstract_state,
    decay_mask,
    init_state,
    make_eval_step,
    make_train_step,
    start_state,
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
    # 1. Check what can be checked without text.
    config.check()
    mesh = make_mesh(config.mesh)
    config.check_mesh(mesh)
    model = build_model(config.model, config.compute)
    rules = config.compute.rules
    check_divides(model, rules, mesh)
    if config.init_from is not None:
        check_init_from(config.init_from, config)
    check_run_dir(config)

    # 2. Text -> tokenizer -> token stores -> batches.
    tokenizer = prepare_data(config, console)
    batches, held_out = open_batches(config, tokenizer, mesh)
    steps = config.total_steps(batches.examples)
    write_config(config)  # from here on the directory holds this run

    # 3. Model and optimizer: the state is restored if there is one, else made.
    schedule = make_schedule(config.schedule, steps)
    optimizer = make_optimizer(config.optimizer, schedule, decay_mask(model))
    train_step = make_train_step(
        model, optimizer, schedule, seed=config.seed, accumulate=config.accumulate
    )
    eval_step = make_eval_step(model)
    describe(config, model, mesh, batches, steps, console)
    manifest = batches.store.manifest
    tokens = {"tokenizer": manifest.tokenizer_hash, "number": manifest.tokens}
    with (
        jax.set_mesh(mesh),
        Checkpoints(config.run_dir, keep=config.keep, tokens=tokens) as saved,
    ):
        state = first_state(config, model, optimizer, mesh, saved, console)

        # 4. The loop.
        tokens_per_step = config.batch * config.seq_len
        flops_per_token = config.model.train_flops_per_token(config.seq_len)
        metrics = MetricsLogger(
            Path(config.run_dir),
            start_step=int(state.step),
            total_steps=steps,
            tokens_per_step=tokens_per_step,
            flops_per_step=tokens_per_step * flops_per_token,
            devices=list(mesh.devices.flat),
            enabled=jax.process_index() == 0,
        )

        def evaluate_now(params: Params) -> dict[str, float]:
            return evaluate(eval_step, params, held_out, mesh, rules)

        with metrics, stop_on_signals() as stop:
            last = min(steps, config.stop_at or steps)
            first = int(state.step)
            source = device_batches(batches, mesh, rules, start=first, stop=last)
            state = run_steps(
                config, state, source, steps, train_step, evaluate_now, metrics, saved,
                stop,
            )  # fmt: skip
            step = int(state.step)
            saved.save(state)
            if step < steps:
                saved.wait()
                again = "the same command" if stop.is_set() else "without `stop_at`"
                metrics.print(
                    f"Stopped after step {step} of {steps}, saved. "
                    f"Run {again} to go on."
                )
                return Outcome(step, False, stop.is_set(), {})
            results = evaluate_now(state.params)
            saved.wait()
            if not (Path(config.run_dir) / "eval_results.json").exists():
                metrics.log_eval(step, results)

        # 5. What was learnt, and where it is.
        conclude(config, model, state.params, tokenizer, held_out, results, console)
    return Outcome(step, True, False, results)


def run_steps(
    config: RunConfig,
    state: TrainState,
    source: Iterator[dict[str, jax.Array]],
    steps: int,
    train_step,
    evaluate_now,
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
                if eval_now:
                    metrics.log_eval(step, evaluate_now(state.params))
                if save_now:  # after it: a run that goes on from here has both
                    saved.save(state)
        if stop.is_set():
            break
    log(pending)
    return state


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process."""
    stop, former = threading.Event(), {}

    def handle(number, frame):
        stop.set()
        for signal_number, handler in former.items():
            signal.signal(signal_number, handler)
        # Not print(): the signal may have come in the middle of one.
        os.write(
            2, b"\nStopping when this step is done; a second signal ends at once.\n"
        )

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


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
        console.print(
            f"Going on from step {int(state.step)} in {saved.directory}", markup=False
        )
        return state
    if config.init_from is not None:
        weights = hf.read_params(config.init_from, model)
        target = abstract_params(model, config.compute.rules, mesh)
        params = jax.tree.map(
            lambda x, t: jax.device_put(x, t.sharding), weights, target
        )
        return jax.jit(lambda p: start_state(p, optimizer))(params)
    return jax.jit(lambda: init_state(model, optimizer, config.seed))()


def conclude(
    config: RunConfig,
    model: Model,
    params: Params,
    tokenizer,
    held_out: EvalBatches,
    results: dict[str, float],
    console: Console,
) -> None:
    """Exports the model and reports, the unigram loss added to `results`."""
    store = TokenStore.open(Path(config.store_dir) / "train")
    results["unigram_loss"] = unigram_loss(store, held_out, config.model.vocab)
    hf.export(config.model, params, tokenizer, Path(config.run_dir) / "hf")
    prompt, sample = config.sample_prompt, None
    if prompt is not None:
        sampling = Sampling(max_new_tokens=80, seed=config.seed)
        (sample,) = complete(model, params, tokenizer, prompt, sampling)
    report(config, results, sample, console)


def check_init_from(folder: str, config: RunConfig) -> None:
    """InputError naming the fields in which the first weights' model is another."""
    found = hf.read_config(folder)
    if type(found) is not type(config.model):
        raise InputError(
            f"{folder} holds a {type(found).__name__}, the config a "
            f"{type(config.model).__name__}."
        )
    free = {name: None for name in vars(found) if "dropout" in name} | {
        "init_std": None
    }
    wrong = differences(vars(found) | free, vars(config.model) | free)
    if wrong:
        raise InputError(
            f"The model in {folder} is not the config's: {'; '.join(wrong)}."
        )
