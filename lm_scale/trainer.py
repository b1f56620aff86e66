# SPDX-License-Identifier: Apache-2.0
"""train(config): set up, restore, loop, evaluate, save, export."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from lm_scale import distributed, hf
from lm_scale.checkpoint import Checkpoints, has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.data.corpus import Part
from lm_scale.data.loader import EvalBatches, TrainBatches, device_batches
from lm_scale.errors import InputError
from lm_scale.evaluate import evaluate, unigram_loss
from lm_scale.first_weights import read_weights
from lm_scale.generate import Sampling, complete
from lm_scale.hub import HubUploads
from lm_scale.metrics import MetricsLogger
from lm_scale.models import Model
from lm_scale.optim import make_optimizer, make_schedule
from lm_scale.report import describe, report
from lm_scale.run_json import FREE, TRAINING, check_run_dir, former, to_dict
from lm_scale.runs import (
    OpenRun,
    held_out_loss,
    open_eval,
    open_train,
    prepare_data,
)
from lm_scale.sharding import Params, abstract_params
from lm_scale.start import fingerprint, first_state, keep_config, set_up
from lm_scale.step import (
    TrainState,
    decay_mask,
    make_eval_step,
    make_train_step,
    matrix_axes,
)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int  # updates made in all
    finished: bool  # False: stopped early, by a signal or `stop_at`
    interrupted: bool  # True: by a signal
    results: dict[str, float]  # eval_loss ..., empty unless finished


def train(
    config: RunConfig,
    console: Console | None = None,
    *,
    hub_token: str | None = None,
    made: tuple[Mesh, Model] | None = None,
) -> Outcome:
    """Trains as `config` says; goes on where a former call in its run_dir stopped.

    The run directory holds `run.json` (the config), `data/`, `checkpoints/`,
    `metrics.jsonl`, TensorBoard's files and, at the end, `eval_results.json` and the
    model as Hugging Face knows it: `config.json`, weights and tokenizer.
    Raises InputError, before any long work, for whatever the config has wrong.
    `hub_token` may write to `config.hub` (None: the one that is logged in). `made` is
    what `set_up(config)` gave, where it was called before.
    """
    console = console or Console()
    # 1. Check what can be checked without text.
    mesh, model = made or set_up(config)
    rules = config.compute.rules
    distributed.on_first(lambda: check_run_dir(config))
    there = former(config)
    for folder in (config.run_dir, config.store_dir):
        distributed.check_shared(Path(folder))

    # 2. Text -> tokenizer -> token stores -> batches.
    parts: list[Part] = ["train", "validation"] if config.evaluates else ["train"]
    tokenizer = prepare_data(config, console, parts)
    batches = open_train(config, tokenizer, mesh)
    held_out = open_eval(config, tokenizer, mesh) if config.evaluates else None
    steps = config.total_steps(batches.examples)
    distributed.agree(fingerprint(batches))

    # 3. Model and optimizer: the state is restored if there is one, else made.
    schedule = make_schedule(config.schedule, steps)
    optimizer = make_optimizer(
        config.optimizer, schedule, decay_mask(model), matrix_axes(model)
    )
    train_step = make_train_step(
        model, optimizer, schedule, seed=config.seed, accumulate=config.accumulate
    )
    eval_step = make_eval_step(model)
    describe(config, model, mesh, batches, steps, console)
    with (
        jax.set_mesh(mesh),
        Checkpoints(
            config.run_dir, keep=config.keep, tokens=fingerprint(batches)
        ) as saved,
    ):
        state = first_state(config, model, optimizer, mesh, saved, console)
        # From here on the directory holds this run.
        keep_config(config, there, int(state.step), fingerprint(batches), console)

        # 4. The loop.
        metrics = metrics_of(config, mesh, batches, int(state.step), steps)
        uploads = start_uploads(config, hub_token, metrics)

        def save_now(state: TrainState) -> None:
            saved.save(state)
            idle = uploads is not None and not uploads.busy
            if distributed.from_first(idle):
                hf.export(config.model, state.params, tokenizer, config.run_dir)
            if uploads is not None and idle:
                uploads.start(f"Step {int(state.step)}")

        with metrics, stop_on_signals() as told:
            stop = distributed.StopVote(told, mesh)

            def evaluate_now(state: TrainState) -> dict[str, float]:
                assert held_out is not None  # config.evaluates
                return evaluate(eval_step, state.params, held_out, mesh, rules, stop)

            last = min(steps, config.stop_at or steps)
            first = int(state.step)
            source = device_batches(batches, mesh, rules, start=first, stop=last)
            state = run_steps(
                config, state, source, steps, train_step, evaluate_now, save_now,
                metrics, stop,
            )  # fmt: skip
            step = int(state.step)
            saved.save(state)
            results = {}
            if step == steps and config.eval_at_end:
                results = evaluate_now(state)
            saved.wait()
            if step < steps or (config.eval_at_end and not results):
                again = "the same command" if stop.stopped else "without `stop_at`"
                metrics.print(
                    f"Stopped after step {step} of {steps}, saved. "
                    f"Run {again} to go on."
                )
                if uploads is not None:
                    uploads.give_up()
                return Outcome(step, False, stop.stopped, {})
            if results and not metrics.has_eval(step):
                metrics.log_eval(step, results)

        # 5. What was learnt, and where it is.
        conclude(
            config, model, state.params, tokenizer, batches, held_out, results, console
        )
        if uploads is not None:
            uploads.finish(f"Step {step}, the end")
    return Outcome(step, True, False, results)


def evaluate_only(
    config: RunConfig,
    console: Console | None = None,
    *,
    made: tuple[Mesh, Model] | None = None,
) -> dict[str, float]:
    """The held-out loss of the weights of `init_from`; trains nothing.

    If that is None, of the newest checkpoint in run_dir; InputError if there is none,
    or if the run there has another model or other text. Writes `eval_results.json`.
    `made` as in `train`.
    """
    console = console or Console()
    mesh, model = made or set_up(config)
    own = config.init_from is None
    distributed.on_first(lambda: check_run_dir(config, free=FREE + TRAINING))
    if own and not has_checkpoints(config.run_dir):
        raise InputError(
            f"There are no weights to evaluate: {config.run_dir} has no checkpoints, "
            f"and no pretrained model is named. Train, or name one."
        )
    tokenizer = prepare_data(config, console, ["validation"])
    with jax.set_mesh(mesh):
        if own:
            target = abstract_params(model, config.compute.rules, mesh)
            with Checkpoints(config.run_dir) as saved:
                params = saved.restore_params(target)
        else:
            params = read_weights(config, model, mesh, console)
    results = held_out_loss(OpenRun(config, mesh, model, params, tokenizer))
    if distributed.index() == 0:
        report(config, results, None, console)
    return results


def run_steps(
    config: RunConfig,
    state: TrainState,
    source: Iterator[dict[str, jax.Array]],
    steps: int,
    train_step,
    evaluate_now: Callable[[TrainState], dict[str, float]],
    save_now: Callable[[TrainState], None],
    metrics: MetricsLogger,
    stop: Callable[[], bool],
) -> TrainState:
    """Steps until `source` ends or `stop` says so; evaluates and saves on the way."""
    step = int(state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def log(pending) -> None:
        if pending is not None:
            number, values = pending
            write = number % config.log_every == 0 or number == steps
            write = write or (number == 1 and config.log_first)
            values = {name: float(value) for name, value in values.items()}
            metrics.log_step(number, values, write=write)

    for batch in source:
        state, values = train_step(state, batch)
        step += 1
        # The metrics of the step before are read only now, with this step under way,
        # so that the devices never wait for the host.
        log(pending)
        pending = (step, values)
        eval_due = config.eval_every and step % config.eval_every == 0
        eval_due = eval_due and not (step == steps and config.eval_at_end)
        save_due = config.save_every and step % config.save_every == 0
        if eval_due or save_due:
            log(pending)  # waits for the step: its time is the step's, not the pause's
            pending = None
            with metrics.pause():
                if eval_due and (results := evaluate_now(state)):
                    metrics.log_eval(step, results)
                if save_due:  # after it: a run that goes on from here has both
                    save_now(state)
        if stop():
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
        if distributed.index() == 0:
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


def metrics_of(
    config: RunConfig, mesh: Mesh, batches: TrainBatches, start: int, steps: int
) -> MetricsLogger:
    """The logger of a run that goes from step `start` to step `steps`."""
    tokens_per_step = round(config.batch * batches.source.mean_length)
    flops_per_token = config.model.train_flops_per_token(config.seq_len)
    return MetricsLogger(
        Path(config.run_dir),
        start_step=start,
        total_steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_step=tokens_per_step * flops_per_token,
        devices=list(mesh.devices.flat),
        report_to=config.report_to,
        config=to_dict(config),
        enabled=distributed.index() == 0,
    )


def start_uploads(
    config: RunConfig, token: str | None, metrics: MetricsLogger
) -> HubUploads | None:
    """Process 0's uploads to the hub, if asked for, with the repository being made."""
    if config.hub is None or distributed.index() > 0:
        return None
    folder = Path(config.run_dir)
    uploads = HubUploads(folder, config.hub, token=token, console_print=metrics.print)
    uploads.create()
    return uploads


def conclude(
    config: RunConfig,
    model: Model,
    params: Params,
    tokenizer,
    batches: TrainBatches,
    held_out: EvalBatches | None,
    results: dict[str, float],
    console: Console,
) -> None:
    """Exports the model first, then tells what it has learnt and where everything is.

    Adds the unigram loss to the results, if there are any.
    """
    hf.export(config.model, params, tokenizer, config.run_dir)
    sample = sample_text(config, model, params, tokenizer)
    if distributed.index() > 0:
        return
    if results and held_out is not None:
        store, vocab = batches.source.store, config.model.vocab
        results["unigram_loss"] = unigram_loss(store, held_out, vocab)
    report(config, results, sample, console)


def sample_text(
    config: RunConfig, model: Model, params: Params, tokenizer
) -> str | None:
    """The config's prompt, continued or filled in; None: it has none."""
    if config.sample_prompt is None:
        return None
    sampling = Sampling(max_new_tokens=80, seed=config.seed)
    (sample,) = complete(model, params, tokenizer, config.sample_prompt, sampling)
    return sample
