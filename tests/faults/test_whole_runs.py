# SPDX-License-Identifier: Apache-2.0
"""Whole runs in trouble: killed, signalled, out of space; what they are afterwards.

"The same" is bit for bit: every weight, every line of the logs.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from rich.console import Console
from tiny import causal_run, masked_run

from lm_scale import checkpoint
from lm_scale.__main__ import main
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.config import RunConfig
from lm_scale.errors import InputError, StorageError
from lm_scale.lock import RunLock
from lm_scale.optim import Adafactor
from lm_scale.run_json import note, noted
from lm_scale.runs import open_run
from lm_scale.sharding import MeshShape, flatten
from lm_scale.trainer import train

TESTS = Path(__file__).resolve().parents[1]
QUIET = Console(quiet=True)
STEPS = 12
EXAMPLES = 100
CHANGES = {
    "steps": STEPS, "save_every": 4, "keep": 1, "eval_every": None,
    "eval_at_end": False, "sample_prompt": None, "report_to": (),
}  # fmt: skip
CONFIG = """
from pathlib import Path
from tiny import causal_run
config = causal_run(Path({folder!r}), **{changes!r})
"""


def tiny_run(folder: Path, make=causal_run, **changes) -> RunConfig:
    """Dropout, accumulation, a checkpoint every 4 of 12 steps."""
    return make(folder, **CHANGES | changes)


def weights(config: RunConfig) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in flatten(open_run(config.run_dir).params).items()}


def lines(config: RunConfig, kind: str = "train") -> list[dict]:
    text = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def assert_same(got: RunConfig, want: RunConfig) -> None:
    """Each step once, with the same numbers; the same weights."""
    for name in ("step", "loss", "grad_norm", "learning_rate", "tokens_seen"):
        assert [x[name] for x in lines(got)] == [x[name] for x in lines(want)], name
    for path, value in weights(want).items():
        np.testing.assert_array_equal(weights(got)[path], value, err_msg=path)


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunConfig:
    config = tiny_run(tmp_path_factory.mktemp("undisturbed"))
    assert train(config, QUIET).finished
    return config


def start(fault: str, folder: Path, **changes) -> subprocess.Popen:
    """`lm-scale train`, in a process of its own, with a fault (injected.py)."""
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=str(folder), changes=CHANGES | changes))
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    return subprocess.Popen(
        [sys.executable, str(TESTS / "faults/injected.py"), fault, "train", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "8"},
    )  # fmt: skip


def disturbed(fault: str, folder: Path, **changes) -> tuple[RunConfig, int, str]:
    """The run, its exit status, and what it printed."""
    process = start(fault, folder, **changes)
    shown, _ = process.communicate(timeout=300)
    assert "fault: " in shown, shown
    return tiny_run(folder, **changes), process.returncode, shown


# --- Killed ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "newest"),
    [
        exhaustive("kill@step:6", 4),
        ("kill@unsealed:8", 4),  # all data written, but for the manifest
        exhaustive("kill@sealed:8", 4),  # whole, but without its name
        ("kill@deletion:4", 8),  # in the middle of letting the one before go
    ],
)
def test_killed_and_resumed_is_the_same(fault, newest, undisturbed, tmp_path, capfd):
    config, status, _ = disturbed(fault, tmp_path)
    assert status == -signal.SIGKILL
    assert train(config, Console(width=300)).finished
    assert f"Going on from step {newest} in " in capfd.readouterr().out
    assert_same(config, undisturbed)
    names = {path.name for path in Path(config.checkpoints).iterdir()}
    assert names == {"12"}  # nothing half written or half deleted is left


# --- Signals --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_during_compilation_ends_at_once(tmp_path, undisturbed):
    config, status, shown = disturbed("SIGTERM@compile", tmp_path)
    assert status == 75
    assert "stopped by SIGTERM, nothing to save yet: run the same command" in shown
    assert CheckpointFolder(config.checkpoints).steps() == []
    assert "Traceback" not in shown
    assert train(config, QUIET).finished
    assert_same(config, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGTERM@unsealed:4", exhaustive("SIGINT@step:5")])
def test_a_signal_stops_and_saves(fault, tmp_path, undisturbed):
    """Also while a checkpoint is being written."""
    config, status, shown = disturbed(fault, tmp_path)
    assert status == 75, shown
    (step,) = CheckpointFolder(config.checkpoints).steps()
    assert f"Stopped after step {step} of 12, saved." in shown
    assert "Traceback" not in shown
    assert [line["step"] for line in lines(config)] == list(range(1, step + 1))
    assert train(config, QUIET).finished
    assert_same(config, undisturbed)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_harms_nothing(tmp_path, undisturbed):
    config, status, shown = disturbed("twice@unsealed:8", tmp_path)
    assert status == 75
    assert "a second signal, so at once" in shown and "Traceback" not in shown
    assert CheckpointFolder(config.checkpoints).steps() == [4]
    assert train(config, QUIET).finished
    assert_same(config, undisturbed)


# --- Stopped and resumed --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        exhaustive(causal_run, {}),
        (masked_run, {}),
        exhaustive(causal_run, {"optimizer": Adafactor(clip=1.0)}),
        (causal_run, {"mesh": MeshShape(data=2, fsdp=4)}),
    ],
)
def test_resumed_at_any_step_is_the_same(make, changes, tmp_path):
    """In the first step, at a save, after one, twice in an epoch, at an epoch's end."""
    data = dataclasses.replace(make(tmp_path).data, max_train_examples=EXAMPLES)
    changes = {"data": data, **changes}
    want = tiny_run(tmp_path / "a", make, **changes)
    train(want, QUIET)
    edge = 7  # the step in which the second epoch begins
    assert (edge - 1) * want.batch < EXAMPLES < edge * want.batch
    got = tiny_run(tmp_path / "b", make, **changes)
    for stop in sorted({1, 4, 5, edge}):
        assert train(dataclasses.replace(got, stop_at=stop), QUIET).step == stop
        with (Path(got.run_dir) / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "kind": "tra')  # torn, as by a kill
    assert train(got, QUIET).finished
    assert_same(got, want)
    times = [line["time"] for line in lines(got)]
    assert times == sorted(times)  # the clock of the run goes on, too


# --- Checkpoints gone or damaged ------------------------------------------------------


def test_a_damaged_newest_one_costs_its_steps_only(tmp_path, undisturbed, capfd):
    config = tiny_run(tmp_path, keep=2)
    train(dataclasses.replace(config, stop_at=8), QUIET)
    newest = Path(config.checkpoints) / "8"
    (newest / "manifest.json").write_text("{")
    assert train(config, Console(width=300)).finished
    shown = capfd.readouterr().out
    assert "WARNING: the checkpoint of step 8 cannot be used" in shown
    assert "Going on from step 4 in" in shown
    assert_same(config, undisturbed)
    assert newest.with_name("8.damaged").is_dir()


def test_a_run_whose_checkpoints_are_all_bad_never_begins_anew(tmp_path, capfd):
    config = tiny_run(tmp_path, stop_at=2)
    train(config, QUIET)
    folder = Path(config.checkpoints)
    for path in folder.glob("*/manifest.json"):
        path.unlink()
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(folder=str(tmp_path), changes=CHANGES))
    for _ in range(2):  # not the second time either, when nothing has a step's name
        assert main(["train", str(path)]) == 2
        shown = capfd.readouterr().err
        assert "start anew" in shown and "Traceback" not in shown
    assert {path.name for path in folder.iterdir()} == {"2.damaged"}
    assert main(["train", str(path), "--resume", "fresh"]) == 0
    assert [line["step"] for line in lines(config)] == list(range(1, STEPS + 1))


def test_a_folder_that_is_gone_is_missed(tmp_path):
    config = tiny_run(tmp_path, stop_at=2)
    train(config, QUIET)
    Path(config.checkpoints).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="has saved step 2, but there is no"):
        train(config, QUIET)
    fresh = dataclasses.replace(config, resume="must", run_dir=str(tmp_path / "new"))
    with pytest.raises(InputError, match="resume = 'must', but there is no checkpoint"):
        train(fresh, QUIET)
    (tmp_path / "elsewhere").rename(config.checkpoints)
    assert train(dataclasses.replace(config, resume="must"), QUIET).step == 2


# --- Storage --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; where that is not permitted the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_at_once_and_ends_with_an_error(
    tmp_path, small_disk, undisturbed, capfd, monkeypatch
):
    monkeypatch.setattr(checkpoint, "LAST_TRIES", (0, 0))
    saved = Path(undisturbed.checkpoints, str(STEPS)).rglob("*")
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in saved)
    # There is room for one checkpoint, not for two, however many are passed over.
    room = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(room - size * 3 // 2))
    path = tmp_path / "config.py"
    changes = CHANGES | {"keep": None, "save_every": 1, "log_every": 1}
    path.write_text(CONFIG.format(folder=str(tmp_path), changes=changes))
    status = main(["train", str(path), "--checkpoint-dir", str(small_disk / "c")])
    shown = capfd.readouterr()
    assert status == 1
    assert "could NOT be saved" in shown.out and "space" in shown.out.lower()
    assert "Step 12, the last, could not be saved" in shown.err
    assert "Traceback" not in shown.out + shown.err
    # Training went on, and what was saved before is good.
    config = tiny_run(tmp_path, checkpoint_dir=str(small_disk / "c"))
    assert [line["step"] for line in lines(config)] == list(range(1, STEPS + 1))
    folder = CheckpointFolder(config.checkpoints)
    steps = folder.steps()
    assert steps and main(["checkpoint", "verify", str(folder)]) == 0


def test_a_disk_that_is_full_for_a_while(
    tmp_path, undisturbed, failing, monkeypatch, capfd
):
    """The stand-in, where none can be mounted: two writes fail."""
    failing(2)
    monkeypatch.setattr(checkpoint, "RETRY", 0.0)
    config = tiny_run(tmp_path)
    assert train(config, QUIET).finished
    assert capfd.readouterr().out.count("could NOT be saved (") == 2
    assert_same(config, undisturbed)


def test_a_last_save_that_fails_is_an_error(tmp_path, failing):
    failing(100)
    with pytest.raises(StorageError, match="Step 2, the last, could not be saved"):
        train(tiny_run(tmp_path, stop_at=2), QUIET)


def test_a_fresh_start_forgets_what_the_run_before_it_left_out(tmp_path):
    config = tiny_run(tmp_path)
    Path(config.run_dir).mkdir()
    note(config.run_dir, step=8, left_out=[[3, 5]], rollbacks=2)
    train(dataclasses.replace(config, resume="fresh", stop_at=4), QUIET)
    assert noted(config.run_dir) == {"step": 4}
    assert train(config, QUIET).finished
    assert CheckpointFolder(config.checkpoints).manifest(STEPS).left_out == ()


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_scale.trainer.open_text", lambda *_: pytest.fail("late"))
    (tmp_path / "file").write_text("")
    config = tiny_run(tmp_path, checkpoint_dir=str(tmp_path / "file" / "c"))
    with pytest.raises(InputError, match="Cannot write to .*file/c"):
        train(config, QUIET)


def test_a_second_trainer_is_refused_before_it_does_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_scale.trainer.open_text", lambda *_: pytest.fail("late"))
    config = tiny_run(tmp_path)
    lock = RunLock(epath.Path(config.run_dir), pytest.fail)
    lock.take()
    try:
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
            train(config, QUIET)
    finally:
        lock.release()
