# SPDX-License-Identifier: Apache-2.0
"""A first signal stops a run, a second ends it, whatever the main thread does."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lm_scale.signals import NUMBERS, stop_on_signals

ROOT = Path(__file__).parent.parent
# What XLA's compiler is to Python: a minute in which no handler of it is called.
COMPILE = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)'
BUSY = f"""
import hashlib, os, signal
from lm_scale.signals import stop_on_signals
def compile():
    {COMPILE}
"""


@pytest.fixture
def start():
    """Starts a command; it is ended where a test has failed to do so."""
    started: list[subprocess.Popen] = []

    def start(*command: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_until(process: subprocess.Popen, text: str) -> str:
    lines = ""
    assert process.stdout is not None
    for line in process.stdout:
        lines += line
        if text in line:
            return lines
    pytest.fail(lines)


def end(process: subprocess.Popen) -> str:
    """The rest of its output; its status must be 75."""
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75, shown
    return shown


@pytest.mark.parametrize("number", NUMBERS)
def test_with_nothing_to_save_the_first_ends_it(start, number):
    process = start(
        sys.executable,
        "-c",
        BUSY + "with stop_on_signals():\n"
        "    print('ready')\n"
        "    try: compile()\n"
        "    finally: print('unwound')\n",
    )
    read_until(process, "ready")
    process.send_signal(number)
    assert end(process) == (
        f"stopped by {number.name}, nothing to save yet: run the same command to go "
        f"on.\n"
    )


def test_with_new_steps_the_first_is_told_and_the_second_ends_it(start):
    process = start(
        sys.executable,
        "-c",
        BUSY + "with stop_on_signals() as signals:\n"
        "    signals.at_once = None\n"
        "    print('ready')\n"
        "    signals.told.wait()\n"
        "    try: compile()\n"
        "    finally: print('unwound')\n",
    )
    read_until(process, "ready")
    process.send_signal(signal.SIGTERM)
    read_until(process, "SIGTERM: stopping when this step is done")
    process.send_signal(signal.SIGINT)
    rest = end(process)
    assert "a second signal, so at once" in rest and "unwound" not in rest


def test_the_same_sigterm_sent_twice_is_one(start):
    process = start(
        sys.executable,
        "-c",
        BUSY + "import signal\n"
        "with stop_on_signals() as signals:\n"
        "    signals.at_once = None\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signals.told.wait()\n"
        "print('left')\n",
    )
    shown = read_until(process, "left")
    assert process.wait(timeout=60) == 0
    assert shown.count("stopping when this step is done") == 1


def test_the_first_is_told_while_the_main_thread_is_busy(start):
    process = start(
        sys.executable,
        "-c",
        BUSY + "import threading\n"
        "with stop_on_signals() as signals:\n"
        "    signals.at_once = None\n"
        "    def see():\n"
        "        signals.told.wait()\n"
        "        os.write(1, b'told\\n')\n"
        "    threading.Thread(target=see, daemon=True).start()\n"
        "    print('ready')\n"
        "    compile()\n",
    )
    read_until(process, "ready")
    process.send_signal(signal.SIGTERM)
    read_until(process, "told")
    process.send_signal(signal.SIGINT)
    end(process)


def test_a_worker_s_own_signal_is_not_the_run_s(start):
    """As when a pool of processes is closed: its workers are ended by SIGTERM."""
    process = start(
        sys.executable,
        "-c",
        BUSY + "import warnings, time\n"
        "warnings.simplefilter('ignore')\n"
        "with stop_on_signals() as signals:\n"
        "    worker = os.fork()\n"
        "    if worker == 0:\n"
        "        print('ready')\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    print(os.waitpid(worker, 0)[1], worker)\n"
        "    print(signals.told.is_set())\n"
        "    signal.raise_signal(signal.SIGTERM)\n",
    )
    read_until(process, "ready")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    os.kill(int(children.read_text()), signal.SIGTERM)
    assert read_until(process, "\n").startswith(f"{signal.SIGTERM.value} ")
    assert read_until(process, "\n") == "False\n"
    end(process)


def test_all_is_as_before_afterwards():
    handlers = [signal.getsignal(number) for number in NUMBERS]
    threads = threading.active_count()
    with stop_on_signals() as signals:
        signals.at_once = None
        signal.raise_signal(signal.SIGINT)
        assert signals.told.is_set()
    assert [signal.getsignal(number) for number in NUMBERS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_only_the_main_thread_hears():
    handlers = [signal.getsignal(number) for number in NUMBERS]

    def enter() -> None:
        with stop_on_signals() as signals:
            seen.append(signals.told.is_set())
            seen.extend(signal.getsignal(number) for number in NUMBERS)

    seen: list = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False, *handlers]


TWO = """
import hashlib, os
from lm_scale import distributed
from lm_scale.connect import connect
from lm_scale.signals import stop_on_signals

connect("test", [])
with stop_on_signals() as signals:
    signals.at_once = {at_once!r}
    distributed.agree({{}})
    os.write(2, f"ready {{os.getpid()}}\\n".encode())
    {compile}
"""


@pytest.mark.parametrize("at_once", ["nothing to save yet", None])
def test_one_of_two_processes_is_signalled_and_both_end(start, tmp_path, at_once):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(at_once=at_once, compile=COMPILE))
    # Each notes its status, of which the launcher gives only the first.
    note = f'{sys.executable} {script}; echo $? > {tmp_path}/"$LM_SCALE_PROCESS_ID"'
    local = [sys.executable, str(ROOT / "launch/local.py"), "-n", "2", "--devices", "1"]
    process = start(*local, "--", "sh", "-c", note)
    lines = read_until(process, "ready") + read_until(process, "ready")
    (pid,) = [x.split()[-1] for x in lines.splitlines() if x.startswith("[1] ready")]
    os.kill(int(pid), signal.SIGTERM)
    if at_once is None:
        read_until(process, "[1] process 1: SIGTERM: stopping when this step is done")
        os.kill(int(pid), signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert [(tmp_path / f"{i}").read_text() for i in range(2)] == ["75\n", "75\n"], (
        shown
    )
    why = at_once or "a second signal, so at once"
    name = "SIGINT" if at_once is None else "SIGTERM"
    assert f"[1] process 1: stopped by {name}, {why}: run the same command" in shown
    told = f"[0] process 0: ended, as process 1 was stopped by {name}"
    assert f"{told}, {why}: run the same command" in shown
