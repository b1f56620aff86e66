# SPDX-License-Identifier: Apache-2.0
"""What takes too long is ended, with its stacks; what was only suspended is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_scale import watchdog
from lm_scale.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
TICKS_OF_20_MS = "from lm_scale import watchdog; watchdog.TICK = 0.02\n"


def start(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, **options,
    )  # fmt: skip


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and what it wrote to stderr."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


# --- Limits ---------------------------------------------------------------------------


@pytest.fixture
def limit_of():
    """begin(work, shape), the work before having taken so many seconds -> its limit."""
    dogs = {}

    def begin(dog: Watchdog, work: str, shape=None, *, former: float = 0) -> float:
        dogs[dog] = dogs.get(dog, 0) + former
        dog._ticks = round(dogs[dog] / watchdog.TICK)
        dog.begin(work, shape)
        return dog._work[1]

    return begin


def test_a_step_s_limit_comes_from_the_slowest_of_late(limit_of):
    dog = Watchdog(None, 1000)
    assert limit_of(dog, "a step", (8, 16)) == 1000  # compiles
    # The next two may wait for another process's compilation.
    assert limit_of(dog, "a step", (8, 16), former=300) == 1000
    assert limit_of(dog, "a step", (8, 16), former=200) == 1000
    assert limit_of(dog, "a step", (8, 16), former=100) == 1000  # none is observed yet
    assert limit_of(dog, "a step", (8, 16), former=2) == 60
    assert limit_of(dog, "a step", (8, 16), former=4) == 80
    assert limit_of(dog, "a step", (8, 16), former=1) == 80
    for _ in range(watchdog.RECENT):
        last = limit_of(dog, "a step", (8, 16), former=3.5)
    assert last == pytest.approx(20 * 4, abs=20)  # in whole ticks
    assert limit_of(dog, "a step", (8, 32), former=3) == 1000  # another program


def test_after_a_pause_others_may_be_late(limit_of):
    dog = Watchdog(5, 1000)
    steps = [limit_of(dog, "a step", (1,), former=1) for _ in range(5)]
    assert steps == [1000, 1000, 1000, 5, 5]
    assert limit_of(dog, "saving") == 1000
    steps = [limit_of(dog, "a step", (1,), former=900) for _ in range(3)]
    assert steps == [1000, 1000, 5]


def test_limits_that_are_given(limit_of):
    assert limit_of(Watchdog(0, 10), "saving") == 10
    unlimited = Watchdog(None, 0)
    assert [limit_of(unlimited, "a step", (1,)) for _ in range(5)] == [0, 0, 0, 0, 60]
    assert limit_of(Watchdog(99, 10), "restoring") == 99  # never less than a step's
    with Watchdog(0, 0) as off:
        assert not off._thread.is_alive()


# --- Processes ------------------------------------------------------------------------


def test_what_hangs_is_shown_and_ended():
    process = start(
        TICKS_OF_20_MS + "import time\n"
        "def stuck():\n"
        "    time.sleep(1000)\n"
        "with watchdog.Watchdog(None, 0.1) as dog:\n"
        "    try:\n"
        "        dog.begin('saving a checkpoint')\n"
        "        stuck()\n"
        "    finally:\n"
        "        print('unwound')\n"
    )
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "saving a checkpoint has not ended after 0 s, its limit is 0.1 s" in errors
    assert "run the same command" in errors and "in stuck" in errors
    assert "unwound" not in shown


def test_work_that_goes_on_is_left_alone():
    process = start(
        TICKS_OF_20_MS + "import time\n"
        "with watchdog.Watchdog(0.5, 0.5) as dog:\n"
        "    for step in range(20):\n"
        "        dog.begin('a step', (1,))\n"
        "        time.sleep(0.05)\n"
        "time.sleep(0.6)\n"  # nobody watches any more
    )
    assert end(process) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_suspended_time_does_not_count():
    process = start(
        TICKS_OF_20_MS + "import time\n"
        "with watchdog.Watchdog(None, 1):\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
        "    time.sleep(0.1)\n"  # in which it would be judged
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate("go on\n", timeout=60) == ("", "")
    assert process.returncode == 0


def test_the_end_does_not_wait_for_a_lost_store():
    """The machine of process 0 is gone, and the main thread hangs telling it."""
    process = start(
        "import threading\n"
        "from lm_scale import distributed\n"
        "class Lost:\n"
        "    def key_value_set(self, *_): threading.Event().wait()\n"
        "distributed.global_state.client = Lost()\n"
        "distributed.global_state.num_processes = 2\n"
        "distributed.ENDING = 0.2\n"
        "distributed.fail('broken', 3)\n"
    )
    assert end(process) == (3, "process 0: broken\n")


TWO = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding
from lm_scale import distributed, watchdog
from lm_scale.connect import connect

connect("test", [])
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
sharding = NamedSharding(mesh, jax.P("data"))
ones = jax.make_array_from_callback((2,), sharding, lambda _: np.ones(1))
total = jax.jit(lambda x: x.sum())

def stuck():
    time.sleep(1000)

watchdog.TICK = 0.1
# The other one has more time: it hears of the end.
with watchdog.Watchdog(2 if distributed.index() else 60, 60) as dog:
    for step in range(10):
        dog.begin("a step", (1,))
        if step == 6 and distributed.index() == 1:
            stuck()
        float(total(ones))
"""


def test_of_two_processes_one_hangs_and_both_end(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    note = f'{sys.executable} {script}; echo $? > {tmp_path}/"$LM_SCALE_PROCESS_ID"'
    local = [sys.executable, str(ROOT / "launch/local.py"), "-n", "2", "--devices", "1"]
    done = subprocess.run(
        [*local, "--", "sh", "-c", note], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    shown = done.stdout
    assert [(tmp_path / f"{i}").read_text() for i in range(2)] == ["75\n", "75\n"], (
        shown
    )
    assert "a step has not ended after 2 s, its limit is 2 s" in shown
    assert "ended, as process" in shown
    (stuck,) = [line for line in shown.splitlines() if "in stuck" in line]
    assert stuck.startswith("[1] ")
