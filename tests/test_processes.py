# SPDX-License-Identifier: Apache-2.0
"""Two processes of 4 devices are one run: as 1 process of 8 devices, and in trouble."""

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
from rich.console import Console
from safetensors.numpy import load_file
from tiny import causal_run

from lm_scale.__main__ import main
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.config import RunConfig
from lm_scale.run_json import read_run
from lm_scale.run_text import open_train
from lm_scale.runs import open_run
from lm_scale.trainer import train

ROOT = Path(__file__).parent.parent
QUIET = Console(quiet=True)
STEPS = 8
CONFIG = """
from pathlib import Path
from tiny import causal_run
config = causal_run(Path({folder!r}), **{changes!r})
"""
CHANGES = {
    "accumulate": 1, "steps": STEPS, "eval_every": None, "save_every": 4, "keep": None,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_orphans():
    """Ends what a failed test has left running: with a launcher end its processes."""
    yield
    for process in launched:
        process.kill()
        process.wait()


launched: list[subprocess.Popen] = []


def launch(*command: str) -> subprocess.Popen:
    """`python COMMAND` as 2 processes of 4 devices; errors are in its output."""
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/local.py"), "-n", "2", "--devices", "4",
         "--", sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    launched.append(process)
    return process


def finished(process: subprocess.Popen) -> str:
    """All its output; it must succeed."""
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    return shown


def config_file(folder: Path, **changes) -> tuple[str, RunConfig]:
    """A config file in a folder, and what it holds."""
    changes = CHANGES | changes
    config = causal_run(folder, **changes)
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=str(folder), changes=changes))
    return str(path), config


def losses(run_dir: str | Path) -> list[float]:
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    kept = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in kept] == list(range(1, len(kept) + 1))
    return [line["loss"] for line in kept]


def assert_same_run(got: str | Path, want: str | Path) -> None:
    """Losses and exported weights, to what sums in another order come to in f32."""
    assert len(losses(got)) == STEPS
    np.testing.assert_allclose(losses(got), losses(want), rtol=1e-5)
    weights = [load_file(Path(run) / "model.safetensors") for run in (got, want)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        np.testing.assert_allclose(weights[0][name], value, atol=1e-4, err_msg=name)


def with_less(run_dir: str, target: Path) -> str:
    """A copy of a run as it was after its checkpoint of step 4."""
    shutil.copytree(run_dir, target)
    shutil.rmtree(target / "checkpoints" / str(STEPS))
    (target / "model.safetensors").unlink()
    return str(target)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> RunConfig:
    """A finished run of one process on 8 devices."""
    _, config = config_file(tmp_path_factory.mktemp("alone"))
    train(config, QUIET)
    return config


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> str:
    """The directory of a finished run of two processes on 4 devices each."""
    folder = tmp_path_factory.mktemp("together")
    path, config = config_file(folder)
    shown = finished(launch("-m", "lm_scale", "train", path))
    assert "[0] devices    8 × cpu, mesh data=8" in shown
    assert "held-out loss" in shown
    errors = [line for line in shown.splitlines() if line.startswith("[1] ")]
    assert not [line for line in errors if "Gloo" not in line], errors
    return config.run_dir


@pytest.mark.slow
def test_two_processes_train_as_one(alone, together):
    assert_same_run(together, alone.run_dir)
    both = [
        json.loads((Path(run) / "eval_results.json").read_text())
        for run in (together, alone.run_dir)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert not list(Path(together).glob(".shared*"))


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_have_saved(alone, together, tmp_path):
    run_dir = with_less(together, tmp_path / "run")
    train(read_run(run_dir), QUIET)
    assert_same_run(run_dir, alone.run_dir)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_has_saved(alone, tmp_path):
    """On a mesh of three axes, whose groups of devices cross the processes or not."""
    run_dir = with_less(alone.run_dir, tmp_path / "run")
    path = Path(alone.run_dir).parent / "config.py"
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    command = ["-m", "lm_scale", "train", str(path), "--run-dir", run_dir, *mesh]
    shown = finished(launch(*command))
    assert "Going on from step 4" in shown and "data=2 fsdp=2 tensor=2" in shown
    assert_same_run(run_dir, alone.run_dir)


PREPARE_AND_TRAIN = """
import sys
from lm_scale import distributed
from lm_scale.connect import connect
from lm_scale.__main__ import COMMANDS
connect("test", [])
for command in ("prepare", "train"):
    COMMANDS[command](sys.argv[1:])
distributed.finish()
"""


@pytest.mark.slow
def test_a_stream_of_two_processes_is_that_of_one(tmp_path):
    """Both prepare what is stored of it, and each reads the lanes of its own rows."""
    path, config = config_file(tmp_path)
    flags = ["--data.stream", "--data.stream-lanes", "2", "--data.stream-buffer", "30"]
    shown = finished(launch("-c", PREPARE_AND_TRAIN, path, *flags))
    assert "[0] rank 0 of 2, told by jax.distributed" in shown
    assert "[0] validation: " in shown and "[1] validation" not in shown

    lanes = {"stream": True, "stream_lanes": 2, "stream_buffer": 30}
    data = dataclasses.replace(config.data, **lanes)
    alone = dataclasses.replace(config, data=data, run_dir=str(tmp_path / "alone"))
    train(alone, QUIET)
    assert_same_run(config.run_dir, alone.run_dir)
    places = []
    for run in (config.run_dir, alone.run_dir):
        manifest = Path(run, "checkpoints", str(STEPS), "manifest.json")
        places.append(json.loads(manifest.read_text())["stream"])
    assert places[0] == places[1] and set(places[0]["lanes"]) == {"0", "1"}


# One start for all: each takes seconds.
COMMANDS_OF_A_RUN = """
import json, sys
from pathlib import Path
from lm_scale import distributed
from lm_scale.connect import connect
from lm_scale.__main__ import COMMANDS
from lm_scale.data.loader import TrainBatches, device_batches
from lm_scale.run_text import open_train
from lm_scale.runs import open_run

run_dir, out = sys.argv[1:3]
connect("test", [])
COMMANDS["eval"]([run_dir])
COMMANDS["generate"]([run_dir, "--prompt", "the cat", "--max-new-tokens", "9"])
COMMANDS["export"]([run_dir, "--out", out + "/exported"])

run, read = open_run(run_dir), TrainBatches.rows
asked = set()
TrainBatches.rows = lambda self, *which: asked.update(which[1]) or read(self, *which)
batches = open_train(run.config, run.tokenizer, run.mesh)
batch, = device_batches(batches, run.mesh, run.config.compute.rules, start=3, stop=4)
shards = batch["tokens"].addressable_shards
shards = [[shard.index[0].start, shard.data.tolist()] for shard in shards]
shown = {"rows": sorted(asked), "shards": shards}
Path(out, f"rows-{distributed.index()}.json").write_text(json.dumps(shown))
distributed.finish()
"""


@pytest.mark.slow
def test_evaluating_generating_exporting_and_reading(together, tmp_path, capsys):
    shown = finished(launch("-c", COMMANDS_OF_A_RUN, together, str(tmp_path)))
    lines = [line[4:] for line in shown.splitlines() if line.startswith("[0] ")]

    assert main(["eval", together]) == 0
    for line in capsys.readouterr().out.splitlines():
        name, value = line.split(": ")
        (found,) = [x.split(": ")[1] for x in lines if x.startswith(f"{name}: ")]
        assert float(found) == pytest.approx(float(value), rel=1e-5)
    assert (
        main(["generate", together, "--prompt", "the cat", "--max-new-tokens", "9"])
        == 0
    )
    assert capsys.readouterr().out.strip() in lines
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, value in load_file(Path(together) / "model.safetensors").items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)

    # Each process reads its own half of a batch, and together they have the whole.
    run = open_run(together)
    whole = open_train(run.config, run.tokenizer, run.mesh).rows(3, range(16))["tokens"]
    for process in range(2):
        told = json.loads((tmp_path / f"rows-{process}.json").read_text())
        assert told["rows"] == list(range(8 * process, 8 * process + 8))
        assert len(told["shards"]) == 4
        for start, tokens in told["shards"]:
            np.testing.assert_array_equal(tokens, whole[start : start + 2])


def test_processes_that_differ_say_in_what_and_end(tmp_path):
    path, _ = config_file(tmp_path)
    train_it = (
        f'{sys.executable} -m lm_scale train {path} --seed "$LM_SCALE_PROCESS_ID"'
    )
    # Each notes its status, of which the launcher gives only the first.
    note = f'echo $? > {tmp_path}/status-"$LM_SCALE_PROCESS_ID"'
    script = f"import os; os.execvp('sh', ['sh', '-c', {f'{train_it}; {note}'!r}])"
    process = launch("-c", script)
    shown, _ = process.communicate(timeout=120)
    assert "process 1: seed 1, process 0: 0" in shown, shown
    assert [(tmp_path / f"status-{i}").read_text() for i in range(2)] == ["2\n", "2\n"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_usage_is_said_without_a_traceback(tmp_path):
    path, _ = config_file(tmp_path)
    process = launch("-m", "lm_scale", "train", path, "--sede", "3")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "--seed" in shown and "Traceback" not in shown, shown


def read_until(process: subprocess.Popen, text: str) -> list[str]:
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    pytest.fail("".join(lines))


def child(process: subprocess.Popen, number: int) -> int:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(path.read_text().split()[number])


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="no /proc")


@pytest.mark.slow
@needs_proc
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    path, config = config_file(tmp_path, steps=100_000, save_every=None)
    process = launch("-m", "lm_scale", "train", path)
    read_until(process, "step 3/")
    os.kill(child(process, 1), signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75, shown
    assert "saved. Run the same command to go on" in shown
    (saved,) = (Path(config.run_dir) / "checkpoints").iterdir()
    assert int(saved.name) == len(losses(config.run_dir))


@pytest.mark.slow
@needs_proc
def test_a_killed_process_ends_the_others(tmp_path):
    path, _ = config_file(tmp_path, steps=100_000, save_every=None)
    process = launch("-m", "lm_scale", "train", path)
    read_until(process, "step 3/")
    other = child(process, 0)
    os.kill(child(process, 1), signal.SIGKILL)
    shown, _ = process.communicate(timeout=60)  # of which jax's own limit is 100
    assert process.returncode == 128 + signal.SIGKILL, shown
    assert "process 1 was killed by signal 9" in shown
    assert not Path(f"/proc/{other}").exists()


@pytest.mark.slow
@needs_proc
def test_killed_in_the_midst_and_started_again_all_is_the_same(alone, tmp_path):
    """Process 0, on which the others depend."""
    path, config = config_file(tmp_path)
    fault = [str(ROOT / "tests/faults/injected.py"), "wait@step:6", "train", path]
    process = launch(*fault)
    read_until(process, "fault: wait")  # process 1, with a checkpoint of step 4
    os.kill(child(process, 0), signal.SIGKILL)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, shown
    shown = finished(launch("-m", "lm_scale", "train", path))
    assert "Going on from step 4 in " in shown
    assert_same_run(config.run_dir, alone.run_dir)


@pytest.mark.slow
def test_an_exception_in_one_ends_all_with_its_traceback(tmp_path):
    path, config = config_file(tmp_path)
    fault = [str(ROOT / "tests/faults/injected.py"), "raise@step:6", "train", path]
    process = launch(*fault)
    shown, _ = process.communicate(timeout=120)  # of which jax's own limits are 300
    assert process.returncode == 1, shown
    assert "[1] RuntimeError: an error that was injected" in shown
    assert "[0] process 0: ended, as process 1 failed: lm-scale train: " in shown
    folder = CheckpointFolder(config.checkpoints)
    assert folder.steps() == [4]
    folder.manifest(4)  # good


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_save_that_fails_on_one_is_told_and_training_goes_on(alone, tmp_path):
    path, config = config_file(tmp_path)
    fault = [str(ROOT / "tests/faults/injected.py"), "raise@saving", "train", path]
    shown = finished(launch(*fault))
    lost = "WARNING: step 4 could NOT be saved"
    assert f"[1] process 1: {lost} (an error that was injected)" in shown
    assert f"[0] {lost} (process 1: an error that was injected)" in shown
    assert CheckpointFolder(config.checkpoints).steps() == [8]
    assert_same_run(config.run_dir, alone.run_dir)


@pytest.mark.slow
def test_trouble_that_one_sees_rolls_all_back(tmp_path):
    path, config = config_file(tmp_path, steps=40, save_every=10)
    fault = [str(ROOT / "tests/faults/injected.py"), "spike@step:34", "train", path,
             "--guard.policy", "rollback", "--guard.window", "4",
             "--guard.patience", "3"]  # fmt: skip
    shown = finished(launch(*fault))
    assert "Rolled back to step 30 (the 1. of at most 3 times)" in shown
    text = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in map(json.loads, text) if line["kind"] == "train"]
    assert [line["step"] for line in kept] == list(range(1, 41))
    assert CheckpointFolder(config.checkpoints).manifest(40).left_out == ((31, 35),)


MET = """
from lm_scale import distributed
from lm_scale.connect import connect
connect("test", [])
distributed.meet("a", "over", 60)
if distributed.index() == 1:
    distributed.give_up("over", "no space")
else:
    try:
        distributed.meet("b", "over", 60)
    except RuntimeError as error:
        print("not met:", error)
distributed.finish()
"""


def test_who_waits_hears_that_another_gives_up():
    assert "[0] not met: process 1: no space" in finished(launch("-c", MET))


SKEWED = """
import sys, time
from lm_scale import distributed
from lm_scale.connect import connect
connect("test", [])
if distributed.index() == 1:
    time.sleep(3)  # the other one is done long before
distributed.finish()
"""


def test_a_good_end_waits_for_all():
    shown = finished(launch("-c", SKEWED))
    assert "ended" not in shown
