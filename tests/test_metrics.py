# SPDX-License-Identifier: Apache-2.0
"""metrics.py: what is counted as training time, and files that survive crashes."""

import io
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lm_scale import metrics
from lm_scale.errors import InputError
from lm_scale.metrics import MetricsLogger, check_reporters
from lm_scale.peaks import peak_flops

V3 = SimpleNamespace(device_kind="TPU v3", num_cores=1)


class Clock:
    """A perf_counter that moves only when told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "perf_counter", clock)
    return clock


def logger(run_dir, start_step=0, **changes):
    options = dict(
        total_steps=20, tokens_per_step=300, flops_per_step=None, devices=[V3]
    )
    return MetricsLogger(run_dir, start_step=start_step, **{**options, **changes})


def read_lines(run_dir):
    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(x, parse_constant=no_constant) for x in text.splitlines()]


def read_events(run_dir):
    """The TensorBoard events, in the order of files and of writing."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def read_scalars(run_dir):
    return {
        (value.tag, event.step): value.simple_value
        for event in read_events(run_dir)
        for value in event.summary.value
    }


def test_time_of_the_first_step_and_of_pauses_does_not_count(tmp_path, clock):
    with logger(tmp_path, flops_per_step=123e12, devices=[V3, V3]) as log:
        clock.now += 3
        with log.pause():
            clock.now += 40
        clock.now += 4
        log.log_step(1, {"loss": 5.0}, write=True)
        clock.now += 2
        log.log_step(2, {"loss": 4.0}, write=False)
        with log.pause():
            clock.now += 50
        log.log_eval(2, {"loss": 4.5})
        clock.now += 4
        log.log_step(3, {"loss": np.float32(3.0)}, write=True)
        clock.now += 8
        log.log_step(4, {"loss": 2.0}, write=True)

    first, evaluation, third, fourth = read_lines(tmp_path)
    assert first.pop("unix_time") > 1.7e9
    assert first == {
        "step": 1,
        "kind": "train",
        "loss": 5.0,
        "time": 7.0,
        "tokens_seen": 300,
        "first_step_s": 7.0,
    }
    assert (evaluation["step"], evaluation["kind"]) == (2, "eval")
    assert third["loss"] == 3.0 and "first_step_s" not in third
    assert (third["step_time_s"], third["tokens_per_s"]) == (3.0, 100.0)
    assert third["mfu"] == pytest.approx(1 / 3)  # 123 of 2 x 61.5 TFLOP, in 3 s
    assert (fourth["step_time_s"], fourth["tokens_seen"]) == (8.0, 1200)
    assert [line.get("time") for line in (evaluation, third, fourth)] == [None, 13, 21]


def test_data_wait_is_the_share_of_the_time_since_the_line_before(tmp_path, clock):
    def batches():
        for seconds in (30, 1, 2, 0, 4):  # the first ones belong to the first step
            clock.now += seconds
            yield "batch"
        clock.now += 3

    with logger(tmp_path) as log:
        for step, batch in enumerate(log.timed(batches()), 1):
            assert batch == "batch"
            clock.now += 3
            with log.pause():
                clock.now += 50
            log.log_step(step, {}, write=step in (1, 3, 5))
    waits = [line.get("data_wait") for line in read_lines(tmp_path)]
    assert waits == [None, 3 / 9, 4 / 10]
    assert read_scalars(tmp_path)["train_data_wait", 5] == pytest.approx(0.4)


def test_first_step_is_reported_when_a_later_one_is_written(tmp_path, clock):
    with logger(tmp_path, start_step=7) as log:
        for step in (8, 9, 10):
            clock.now += 9 if step == 8 else 2
            log.log_step(step, {"loss": 1.0}, write=step == 10)
    (line,) = read_lines(tmp_path)
    assert (line["first_step_s"], line["step_time_s"]) == (9.0, 2.0)
    assert line["tokens_seen"] == 3000
    assert "mfu" not in line


def test_train_time_goes_on_in_a_resumed_run(tmp_path, clock):
    """The old scripts' counted from the epoch's start at each line, evaluation too."""
    with logger(tmp_path) as log:
        for step in (1, 2, 3, 4):
            clock.now += 10
            log.log_step(step, {}, write=step != 4)
            if step == 2:
                log.log_eval(2, {"loss": 1.0})
        with log.pause():
            clock.now += 500  # at the end
    clock.now += 1000  # between the processes
    with logger(tmp_path, start_step=2) as log:  # step 3 is lost
        for step in (3, 4, 5):
            clock.now += 7
            log.log_step(step, {}, write=step != 4)
    times = {x["step"]: x["time"] for x in read_lines(tmp_path) if x["kind"] == "train"}
    assert times == {1: 10, 2: 20, 3: 27, 5: 41}
    assert read_scalars(tmp_path)["train_time", 5] == 41.0


def test_tensorboard_tags(tmp_path, clock):
    with logger(tmp_path) as log:
        log.log_step(1, {"loss": 5.0, "learning_rate": 0.5}, write=True)
        log.log_eval(1, {"loss": 4.0, "accuracy": 0.25})
    scalars = read_scalars(tmp_path)
    assert scalars["train_loss", 1] == 5.0
    assert scalars["train_learning_rate", 1] == 0.5
    assert scalars["eval_loss", 1] == 4.0
    assert scalars["eval_accuracy", 1] == 0.25
    assert scalars["train_tokens_seen", 1] == 300


def test_tensorboard_gets_every_step(tmp_path, clock, capsys):
    with logger(tmp_path) as log:
        for step in range(1, 7):
            clock.now += 2
            values = {"loss": 10.0 - step, "learning_rate": 0.5, "grad_norm": 1.5}
            log.log_step(step, values, write=step % 3 == 0)
    points = [
        (value.tag, event.step)
        for event in read_events(tmp_path)
        for value in event.summary.value
    ]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert [n for tag, n in points if tag == f"train_{name}"] == [1, 2, 3, 4, 5, 6]
    for name in ("step_time_s", "tokens_per_s", "time", "tokens_seen"):
        assert [n for tag, n in points if tag == f"train_{name}"] == [3, 6]
    assert read_scalars(tmp_path)["train_loss", 4] == 6.0
    assert [line["step"] for line in read_lines(tmp_path)] == [3, 6]
    assert [line["loss"] for line in read_lines(tmp_path)] == [7.0, 4.0]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, clock):
    for start, end in ((0, 5), (3, 7)):  # 4 and 5, which no line tells of, were lost
        with logger(tmp_path, start_step=start) as log:
            for step in range(start + 1, end + 1):
                clock.now += 1
                log.log_step(step, {"loss": 10.0 * start + step}, write=step % 3 == 0)
    shown = []
    for event in read_events(tmp_path):  # as TensorBoard reads them
        if event.HasField("session_log"):
            shown = [(step, loss) for step, loss in shown if step < event.step]
        for value in event.summary.value:
            if value.tag == "train_loss":
                shown.append((event.step, value.simple_value))
    assert shown == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36), (7, 37)]


def test_has_eval_of_this_and_of_former_processes(tmp_path, clock):
    with logger(tmp_path) as log:
        log.log_step(1, {"loss": 2.0}, write=True)
        assert not log.has_eval(1)
        for step in (2, 4):
            log.log_eval(step, {"loss": 1.0})
        assert log.has_eval(2) and log.has_eval(4)
    with logger(tmp_path, start_step=3) as log:  # the one after step 4 is lost
        assert [step for step in range(6) if log.has_eval(step)] == [2]
        log.log_eval(4, {"loss": 1.0})
        assert log.has_eval(4)


def test_no_reporter_leaves_the_json_lines_and_the_console(tmp_path, clock, capsys):
    with logger(tmp_path, report_to=()) as log:
        log.log_step(1, {"loss": 5.0}, write=True)
        log.log_eval(1, {"loss": 4.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [line["loss"] for line in read_lines(tmp_path)] == [5.0, 4.0]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_not_finite_is_null_in_json_and_shown(tmp_path, clock, capsys, bad):
    with logger(tmp_path) as log:
        log.log_step(1, {"loss": bad}, write=True)
    assert read_lines(tmp_path)[0]["loss"] is None
    assert f"loss {bad}" in capsys.readouterr().out
    assert np.isclose(read_scalars(tmp_path)["train_loss", 1], bad, equal_nan=True)


@pytest.mark.parametrize("torn", ["", '{"step": 3, "ki', '{"step": 3}', "\0\0", "7"])
def test_resume_drops_lost_work_and_a_torn_line(tmp_path, clock, torn):
    with logger(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.log_step(step, {"loss": float(step)}, write=True)
            clock.now += 1
        log.log_eval(2, {"loss": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)

    with logger(tmp_path, start_step=2) as log:
        log.log_step(3, {"loss": 33.0}, write=True)
    lines = [(line["step"], line["loss"]) for line in read_lines(tmp_path)]
    assert lines == [(1, 1.0), (2, 2.0), (2, 9.0), (3, 33.0)]
    assert [p.name for p in tmp_path.glob("*.tmp")] == []

    # TensorBoard hides the points from the step of a later START on.
    starts = [e.step for e in read_events(tmp_path) if e.HasField("session_log")]
    assert starts == [1, 3]


def test_keeps_a_whole_line_that_lost_its_newline(tmp_path, clock):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}')
    with logger(tmp_path, start_step=1) as log:
        log.log_step(2, {"loss": 2.5}, write=True)
    assert [line["loss"] for line in read_lines(tmp_path)] == [1.5, 2.5]


def test_plain_lines_when_not_a_terminal(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI does; rich then sees a terminal
    monkeypatch.setenv("TERM", "xterm")
    with logger(tmp_path) as log:
        for step in (1, 2, 3):
            clock.now += 300
            values = {"loss": 1.25, "learning_rate": 3e-4}
            log.log_step(step, values, write=step != 2)
        log.log_eval(3, {"loss": 1.5})
        log.print("[saved] 3")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/20 | loss 1.2500 | lr 3.00e-04 | first step 300.0 s",
        "step 3/20 | loss 1.2500 | lr 3.00e-04 | tokens/s 1 | data wait 0.0% | "
        "left 1:25:00",
        "step 3/20 | eval: loss 1.5000",
        "[saved] 3",
    ]


def test_bar_on_a_terminal(tmp_path, clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with logger(tmp_path, start_step=5) as log:
        log.log_step(6, {"loss": float("nan")}, write=True)
        log.print("[saved] 6")
    shown = terminal.getvalue()
    assert "step 6/20" in shown and "loss nan" in shown and "[saved] 6" in shown
    assert "step 6/20 |" not in shown  # the plain line


def test_disabled_writes_and_prints_nothing(tmp_path, capsys):
    with logger(tmp_path / "run", enabled=False) as log:
        with log.pause():
            log.log_step(1, {"loss": 1.0}, write=True)
            log.log_eval(1, {"loss": 1.0})
            log.print("text")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_peak_flops_counts_the_cores_of_a_device():
    def device(kind, **more):
        return SimpleNamespace(device_kind=kind, **more)

    assert peak_flops(V3) == 61.5e12
    assert peak_flops(device("TPU v4", num_cores=2)) == 275e12  # megacore
    assert peak_flops(device("TPU v4", num_cores=1)) == 137.5e12
    assert peak_flops(device("TPU v5", num_cores=2)) == 459e12
    assert peak_flops(device("NVIDIA H100 80GB HBM3")) == 989.5e12
    assert peak_flops(device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None
    assert peak_flops(device("cpu")) is None


def test_no_mfu_if_one_device_is_unknown(tmp_path, clock):
    devices = [V3, SimpleNamespace(device_kind="cpu")]
    with logger(tmp_path, flops_per_step=1e12, devices=devices) as log:
        for step in (1, 2):
            clock.now += 1
            log.log_step(step, {}, write=True)
    assert "mfu" not in read_lines(tmp_path)[1]


def test_importing_it_does_not_import_jax():
    code = "import sys, lm_scale.metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- wandb ----------------------------------------------------------------------------


class Wandb(SimpleNamespace):
    """Stands in for the module and for the run that its `init` returns."""

    def __init__(self):
        super().__init__(id="abc1", starting_step=0, options=[], logged=[], ended=[])
        self.error = {}  # what a method raises

    def _fail(self, name):
        if name in self.error:
            raise self.error[name]

    def init(self, **options):
        self.options.append(options)
        self.terminal = sys.stdin.isatty()
        self._fail("init")
        return self

    def log(self, scalars, step):
        self._fail("log")
        self.logged.append((step, scalars))

    def finish(self, exit_code):
        self._fail("finish")
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("WANDB_PROJECT", None)
    return stand_in


def test_wandb_gets_what_tensorboard_gets(tmp_path, clock, wandb):
    folder = tmp_path / "norwegian"
    both = ("tensorboard", "wandb")
    with logger(folder, report_to=both, config={"batch": 8}) as log:
        log.log_step(1, {"loss": np.float32(5.0)}, write=True)
        clock.now += 1
        log.log_step(2, {"loss": 4.5}, write=True)
        log.log_eval(2, {"loss": float("nan")})
    logged = {(tag, n): x for n, values in wandb.logged for tag, x in values.items()}
    assert {"train_loss", "train_time", "eval_loss"} <= {tag for tag, _ in logged}
    assert logged == pytest.approx(read_scalars(folder), nan_ok=True)
    assert {type(value) for value in logged.values()} <= {int, float}
    assert wandb.options == [
        {
            "project": "lm_scale",
            "name": "norwegian",
            "dir": str(folder),
            "config": {"batch": 8},
            "id": None,
            "resume": "allow",
        }
    ]
    assert wandb.ended == [0]
    assert float(os.environ["WANDB_FINISH_TIMEOUT"]) < 600  # its own is: for ever


def test_wandb_project_of_the_environment(tmp_path, clock, wandb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.environ["WANDB_PROJECT"] = "mine"
    os.environ["WANDB_INIT_TIMEOUT"] = "7"
    with logger(".", report_to=("wandb",)):
        pass
    assert wandb.options[0]["project"] == "mine"
    assert wandb.options[0]["name"] == tmp_path.name
    assert os.environ["WANDB_INIT_TIMEOUT"] == "7"


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, clock, wandb):
    def run(start, steps):
        with logger(tmp_path, start_step=start, report_to=("wandb",)) as log:
            for step in steps:
                clock.now += 1
                log.log_step(step, {"loss": 1.0}, write=True)

    run(0, [1, 2, 3])
    wandb.starting_step = 4  # as wandb says that it goes on after step 3
    run(2, [3, 4, 5])
    wandb.starting_step = 0
    run(0, [1])
    assert [options["id"] for options in wandb.options] == [None, "abc1", None]
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4, 5, 1]


def test_wandb_hears_of_a_failed_run(tmp_path, clock, wandb):
    with (
        pytest.raises(ZeroDivisionError),
        logger(tmp_path, report_to=("wandb",)),
    ):
        raise ZeroDivisionError
    assert wandb.ended == [1]


@pytest.mark.parametrize("error", [RuntimeError("no\nlogin"), SystemExit(1)])
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_one_note(tmp_path, clock, wandb, capsys, where, error):
    wandb.error[where] = error
    with logger(tmp_path, report_to=("tensorboard", "wandb")) as log:
        for step in (1, 2, 3):
            clock.now += 1
            log.log_step(step, {"loss": 1.0}, write=True)
    notes = [x for x in capsys.readouterr().out.splitlines() if "wandb" in x]
    reason = " ".join(str(error).split())
    assert notes == [f"wandb failed ({reason}): the run goes on without it."]
    assert len(wandb.logged) == (3 if where == "finish" else 0)
    assert wandb.ended == []
    assert len(read_lines(tmp_path)) == 3
    assert ("train_loss", 3) in read_scalars(tmp_path)


def test_wandb_cannot_ask_for_a_login(tmp_path, clock, wandb, monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with logger(tmp_path, report_to=("wandb",)):
        assert sys.stdin is terminal
    assert wandb.terminal is False


def test_other_processes_start_no_wandb_run(tmp_path, wandb):
    with logger(tmp_path, report_to=("wandb",), enabled=False) as log:
        log.log_step(1, {"loss": 1.0}, write=True)
    assert wandb.options == wandb.logged == wandb.ended == []


def test_check_reporters(monkeypatch, wandb):
    for names in ((), ("tensorboard",), ("wandb", "tensorboard")):
        check_reporters(names)
    with pytest.raises(InputError, match="'tensorbord'"):
        check_reporters(("tensorbord",))
    with pytest.raises(InputError, match="'w'"):
        check_reporters("wandb")  # not a tuple
    for missing in (None, SimpleNamespace()):  # not installed; a folder of that name
        monkeypatch.setitem(sys.modules, "wandb", missing)
        check_reporters(("tensorboard",))
        with pytest.raises(InputError, match="pip install wandb, or leave it out"):
            check_reporters(("wandb",))
