# SPDX-License-Identifier: Apache-2.0
"""metrics.py: what is counted as training time, and files that survive crashes."""

import io
import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lm_scale import metrics
from lm_scale.metrics import MetricsLogger, peak_flops

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
    for path in sorted((run_dir / "tensorboard").iterdir()):
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
    assert first.pop("time") > 1.7e9
    assert first == {
        "step": 1,
        "kind": "train",
        "loss": 5.0,
        "tokens_seen": 300,
        "first_step_s": 7.0,
    }
    assert (evaluation["step"], evaluation["kind"]) == (2, "eval")
    assert third["loss"] == 3.0 and "first_step_s" not in third
    assert (third["step_time_s"], third["tokens_per_s"]) == (3.0, 100.0)
    assert third["mfu"] == pytest.approx(1 / 3)  # 123 of 2 x 61.5 TFLOP, in 3 s
    assert (fourth["step_time_s"], fourth["tokens_seen"]) == (8.0, 1200)


def test_first_step_is_reported_when_a_later_one_is_written(tmp_path, clock):
    with logger(tmp_path, start_step=7) as log:
        for step in (8, 9, 10):
            clock.now += 9 if step == 8 else 2
            log.log_step(step, {"loss": 1.0}, write=step == 10)
    (line,) = read_lines(tmp_path)
    assert (line["first_step_s"], line["step_time_s"]) == (9.0, 2.0)
    assert line["tokens_seen"] == 3000
    assert "mfu" not in line


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
        "step 3/20 | loss 1.2500 | lr 3.00e-04 | tokens/s 1 | left 1:25:00",
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
