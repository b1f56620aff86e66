# SPDX-License-Identifier: Apache-2.0
"""train(config): set up, restore, loop, evaluate, save, export."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from lm_scale import distributed, hf
from lm_scale.assemble import flops_per_token, make_parts
from lm_scale.checkpoint import Saver, restore_params
from lm_scale.checkpoint_folder import CheckpointFolder, has_checkpoints
from lm_scale.config import RunConfig
from lm_scale.data.corpus import Part
from lm_scale.data.loader import EvalBatches, TrainBatches
from lm_scale.data.streamed import StreamedBatches
from lm_scale.errors import InputError
from lm_scale.evaluate import unigram_loss
from lm_scale.first_weights import read_weights
from lm_scale.generate import Sampling, complete
from lm_scale.hub import HubUploads
from lm_scale.lock import RunLock
from lm_scale.loop import Loop
from lm_scale.manifest import is_local
from lm_scale.metrics import MetricsLogger
from lm_scale.models import Model
from lm_scale.report import describe, report
from lm_scale.rollback import check_may_roll_back, left_out_batches, roll_back
from lm_scale.run_json import (
    FREE,
    TRAINING,
    check_run_dir,
    forget,
    note,
    to_dict,
)
from lm_scale.run_text import open_eval, open_stream, open_train, prepare_data
from lm_scale.runs import OpenRun, held_out_loss
from lm_scale.sharding import Params, abstract_params
from lm_scale.signals import Signals, stop_on_signals
from lm_scale.start import fingerprint, first_state, keep_config, set_up
from lm_scale.step import TrainState, abstract_state, make_eval_step
from lm_scale.watchdog import Watchdog
from lm_scale.xla_options import xla_options


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
    Raises InputError, before any long work, for whatever the config has wrong. A first
    SIGINT or SIGTERM stops it, saved; where there is nothing new to save, or a second
    time, it ends the process with status 75.
    `hub_token` may write to `config.hub` (None: the one that is logged in). `made` is
    what `set_up(config)` gave, where it was called before.
    """
    console = console or Console()
    with stop_on_signals() as signals:
        mesh, model = made or set_up(config)
        with locked(config), jax.set_mesh(mesh):
            text = open_text(config, mesh, console)
            return run(config, mesh, model, text, console, signals, hub_token)


@dataclass(frozen=True)
class Text:
    """A run's text, ready to be trained on."""

    tokenizer: Any
    batches: TrainBatches | StreamedBatches
    held_out: EvalBatches | None  # None: the run is not evaluated
    fingerprint: dict[str, str | int]


def open_text(config: RunConfig, mesh: Mesh, console: Console) -> Text:
    """Text -> tokenizer -> token stores -> batches; made if they are not there yet."""
    distributed.on_first(lambda: check_run_dir(config))
    check_folders(config)
    parts: list[Part] = ["train", "validation"] if config.evaluates else ["train"]
    tokenizer = prepare_data(config, console, parts)
    streams = config.data.stream
    batches = (open_stream if streams else open_train)(config, tokenizer, mesh)
    held_out = open_eval(config, tokenizer, mesh) if config.evaluates else None
    tokens = fingerprint(batches)
    distributed.agree(tokens)
    return Text(tokenizer, batches, held_out, tokens)


def check_folders(config: RunConfig) -> None:
    """InputError unless all processes see the checkpoints, and tokens or their own.

    Nothing else in `run_dir` is needed by any but process 0.
    """
    checkpoints = epath.Path(config.checkpoints)
    if is_local(checkpoints):
        there = (path for path in checkpoints.parents if path.exists())
        distributed.check_shared(Path(distributed.from_first(str(next(there, "/")))))
    store = Path(config.store_dir)
    part = "validation" if config.data.stream else "train"
    made = all((store / x / part / "manifest.json").exists() for x in config.corpora)
    if not all(distributed.everyone(made)):  # each had made the same for itself
        distributed.check_shared(store)


def run(
    config: RunConfig,
    mesh: Mesh,
    model: Model,
    text: Text,
    console: Console,
    signals: Signals,
    hub_token: str | None,
) -> Outcome:
    """The state restored or made, the loop, the end."""
    # 1. Model and optimizer: the state is restored if there is one, else made.
    steps = config.total_steps(text.batches.examples)
    parts = make_parts(config, model, steps, xla_options(mesh))
    optimizer = parts.optimizer
    describe(config, model, mesh, text.batches, steps, console)
    folder = CheckpointFolder(config.checkpoints)
    with Watchdog(None, config.wait_limit) as watchdog:
        watchdog.begin("restoring the state")
        state, found = first_state(config, model, optimizer, mesh, folder, console)
    # From here on the directory holds this run.
    keep_config(config, found, text.fingerprint, console)
    if found is not None:
        text.batches.reached = found.stream

    # 2. The loop.
    metrics = metrics_of(config, mesh, text.batches, int(state.step), steps)
    uploads = start_uploads(config, hub_token, metrics)

    def saved(state: TrainState) -> None:
        idle = uploads is not None and not uploads.busy
        if distributed.from_first(idle):
            hf.export(config.model, state.params, text.tokenizer, config.run_dir)
        if uploads is not None and idle:
            uploads.start(f"Step {int(state.step)}")

    if found is None and distributed.index() == 0:
        forget(config.run_dir)  # it begins: of a run before this one
    saver = Saver(
        folder, keep=config.keep, keep_every=config.keep_every,
        keep_best=config.keep_best, config=to_dict(config), tokens=text.fingerprint,
        tell=metrics.print, noted=lambda step: note(config.run_dir, step=step),
    )  # fmt: skip
    # The watchdog innermost: how long the others' ends may take is not its to judge.
    with metrics, saver, Watchdog(config.step_limit, config.wait_limit) as watchdog:
        saver.get_ready(state)
        own = found is not None and found.step in folder.steps()
        if found is not None and distributed.from_first(own):
            saver.adopt(found.step)
        loop = Loop(
            config, mesh, text.batches, text.held_out, steps, parts.step,
            make_eval_step(model), saver, metrics, signals, watchdog, saved,
            left_out=left_out_batches(config, found),
        )  # fmt: skip
        target = functools.partial(abstract_state, model, optimizer, mesh)
        state, results = train_to_end(loop, state, target)
        step = int(state.step)
        if step < steps or (config.eval_at_end and not results):
            say_stopped(loop, step)
            if uploads is not None:
                uploads.give_up()
            if loop.batches.error is not None:
                raise loop.batches.error
            return Outcome(step, False, loop.vote.stopped, {})
        signals.at_once = "all is saved"

    # 3. What was learnt, and where it is.
    with Watchdog(None, config.wait_limit) as watchdog:
        watchdog.begin("exporting the model")
        conclude(config, model, state.params, text, results, console)
    if uploads is not None:
        uploads.finish(f"Step {step}, the end")
    return Outcome(step, True, False, results)


def train_to_end(
    loop: Loop, state: TrainState, target: Callable[[], TrainState]
) -> tuple[TrainState, dict[str, float]]:
    """Steps to the end, a signal or `stop_at`, going back where it must; then saves.

    Returns the last state and, of the run's last, the held-out results.
    """
    state = loop.run(state)
    while loop.trouble is not None and not loop.vote.stopped:
        check_may_roll_back(loop)
        del state  # its memory is needed
        state = loop.run(roll_back(loop, target()))
    return state, {} if loop.trouble is not None else loop.finish(state)


@contextmanager
def locked(config: RunConfig) -> Iterator[None]:
    """Holds the run's folders: no other process may train into them."""
    folders = [config.run_dir]
    if config.checkpoint_dir is not None:
        folders.append(config.checkpoint_dir)
    locks = [RunLock(CheckpointFolder(f).path, lost) for f in folders]
    taken: list[RunLock] = []

    def take() -> None:
        for lock in locks:
            lock.take()
            taken.append(lock)

    try:
        distributed.on_first(take)
        yield
    finally:
        for lock in taken:
            lock.release()


def lost(text: str) -> None:
    """Another process has taken the lock: what this one writes could ruin its run."""
    distributed.fail(text, 1)


def say_stopped(loop: Loop, step: int) -> None:
    """Tells how to go on with a run that has not come to its end."""
    again = "the same command" if loop.vote.stopped else "without `stop_at`"
    saved = "saved" if loop.trouble is None else f"not saved ({loop.trouble.what})"
    loop.metrics.print(
        f"Stopped after step {step} of {loop.steps}, {saved}. Run {again} to go on."
    )


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
    if own and not has_checkpoints(config.checkpoints):
        raise InputError(
            f"There are no weights to evaluate: {config.run_dir} has no checkpoints, "
            f"and no pretrained model is named. Train, or name one."
        )
    tokenizer = prepare_data(config, console, ["validation"])
    with jax.set_mesh(mesh):
        if own:
            target = abstract_params(model, config.compute.rules, mesh)
            params = restore_params(CheckpointFolder(config.checkpoints), target)
        else:
            params = read_weights(config, model, mesh, console)
    results = held_out_loss(OpenRun(config, mesh, model, params, tokenizer))
    if distributed.index() == 0:
        report(config, results, None, console)
    return results


def metrics_of(
    config: RunConfig,
    mesh: Mesh,
    batches: TrainBatches | StreamedBatches,
    start: int,
    steps: int,
) -> MetricsLogger:
    """The logger of a run that goes from step `start` to step `steps`."""
    tokens_per_step = round(config.batch * batches.mean_length)
    return MetricsLogger(
        Path(config.run_dir),
        start_step=start,
        total_steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_step=tokens_per_step * flops_per_token(config),
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
    text: Text,
    results: dict[str, float],
    console: Console,
) -> None:
    """Exports the model first, then tells what it has learnt and where everything is.

    Adds the unigram loss to the results, if there are any, and a token store.
    """
    hf.export(config.model, params, text.tokenizer, config.run_dir)
    sample = sample_text(config, model, params, text.tokenizer)
    if distributed.index() > 0:
        return
    batches = text.batches  # of a stream nobody has counted the tokens
    if results and text.held_out is not None and isinstance(batches, TrainBatches):
        vocab = config.model.vocab
        results["unigram_loss"] = unigram_loss(batches.source, text.held_out, vocab)
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
