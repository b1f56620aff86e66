# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: they agree, wait for one another, and end together.

Every process runs the same program and reaches the calls here in the same order. What
they tell one another before and beside the computation goes through the key-value store
of jax.distributed, which needs no devices. Process 0 alone prints and writes files.
With a single process nothing here does anything, but that `end_run` ends it.
"""

import enum
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # no public name for its store
from jax.sharding import Mesh, NamedSharding

from lm_scale.errors import InputError

T = TypeVar("T")
AnyPath = TypeVar("AnyPath")
VISIBLE = 60  # s that a network file system may take to show another machine's files
ENDING = 15.0  # s that a process may take to tell the others that it ends
_calls = itertools.count()  # the same call has the same number on every process
_ending = threading.Lock()  # the first thread to take it ends the process


def index() -> int:
    """The number of this process; touches no device, unlike jax.process_index()."""
    return global_state.process_id


def count() -> int:
    """The number of processes."""
    return global_state.num_processes


def prefix() -> str:
    """`process 1: `, before what it writes to stderr; empty for a single process."""
    return f"process {index()}: " if count() > 1 else ""


# --- Agreeing -------------------------------------------------------------------------


def agree(facts: Mapping[str, Any]) -> None:
    """Waits for all processes; InputError on each of them if their facts differ."""
    if count() == 1:
        return
    told = _gather(dict(facts))
    found = from_first(told and disagreements(told))
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise InputError(
            f"The processes of the run differ:\n{listed}\nStart the same command, of "
            f"the same code, on machines of one kind."
        )


def disagreements(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who differs from process 0 in what, of each process's facts.

    For example: `processes 2-3: jax version '0.10.2', process 0: '0.12.0'`.
    """
    lines = []
    for name in dict.fromkeys(name for facts in told for name in facts):
        others: dict[str, list[int]] = {}
        for process, facts in enumerate(told):
            if facts.get(name) != told[0].get(name):
                others.setdefault(repr(facts.get(name)), []).append(process)
        lines += [
            f"{_listed(who)}: {name} {value}, process 0: {told[0].get(name)!r}"
            for value, who in others.items()
        ]
    return lines


def _listed(numbers: list[int]) -> str:
    """process 3; processes 1-2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"process {text}" if len(numbers) == 1 else f"processes {text}"


# --- Waiting --------------------------------------------------------------------------


def from_first(value: T) -> T:
    """Process 0's value (of JSON), for which the others wait, however long it takes."""
    if count() == 1:
        return value
    key = str(next(_calls))
    if index() == 0:
        _set(key, value)
    return _get(key)


def everyone(value: T) -> list[T]:
    """All processes' values (of JSON), by process; waits for all of them."""
    if count() == 1:
        return [value]
    return cast(list[T], from_first(_gather(value)))


def _gather(value: Any) -> list[Any] | None:
    """All processes' values, on process 0; None on the others, who do not wait."""
    call = next(_calls)
    _set(f"{call}/{index()}", value)
    if index() > 0:
        return None
    return [_get(f"{call}/{process}") for process in range(count())]


def on_first(work: Callable[[], Any]) -> None:
    """Process 0 does it; the others wait, however long it takes."""
    if index() == 0:
        work()
    from_first(None)


def check_shared(folder: Path) -> None:
    """InputError unless all processes see in a folder what process 0 writes there."""
    if count() == 1:
        return
    mark = folder / from_first(f".shared-{uuid4().hex}")
    on_first(mark.touch)
    sees = "sees" if _appears(mark) else "does not see"
    try:
        agree({f"in {folder}": f"{sees} what process 0 writes"})
    finally:
        if index() == 0:
            mark.unlink()


def meet(key: str, failed: str, seconds: float) -> None:
    """Waits for all processes to come here, with the same key, from any thread.

    Raises RuntimeError once one of them has called `give_up(failed)`, TimeoutError if
    one has not come after so many seconds.
    """
    end = time.monotonic() + seconds

    def wait_for(name: str) -> None:
        while _within_a_second(f"{key}/{name}") is None:
            if (why := _now(failed)) is not None:
                raise RuntimeError(why)
            if time.monotonic() > end:
                raise TimeoutError(f"{name} has not come")

    _set(f"{key}/process {index()}", True)
    if index() == 0:
        for process in range(count()):
            wait_for(f"process {process}")
        _set(f"{key}/all", True)
    wait_for("all")


def give_up(failed: str, why: str) -> None:
    """Tells those who `meet` that this process will not come."""
    if count() > 1 and _now(failed) is None:
        try:
            _set(failed, f"process {index()}: {why}")
        except jax.errors.JaxRuntimeError:
            pass  # another one was first


def see(path: AnyPath) -> AnyPath:
    """The path, once this process sees it; InputError if it does not."""
    if not _appears(path):
        raise InputError(
            f"There is no {path} here, which process 0 has written. The run's folders "
            f"must be shared by all processes."
        )
    return path


def _appears(path: Any) -> bool:
    end = time.monotonic() + VISIBLE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _client() -> Any:
    return global_state.client


def _set(key: str, value: Any) -> None:
    _client().key_value_set(f"lm_scale/{key}", json.dumps(value))


def _get(key: str) -> Any:
    """A key's value, once some process has set it; Ctrl-C is heard meanwhile."""
    while (value := _within_a_second(key)) is None:
        pass  # Python hears a signal only between two calls
    return json.loads(value)


def _within_a_second(key: str) -> str | None:
    """A key's value, as text; None: nobody has set it within a second."""
    try:
        return _client().blocking_key_value_get(f"lm_scale/{key}", 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _now(key: str) -> Any:
    """A key's value; None: nobody has set it yet."""
    try:
        return json.loads(_client().key_value_try_get(f"lm_scale/{key}"))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


# --- Voting ---------------------------------------------------------------------------


class Request(enum.IntEnum):
    """What a process asks all to do after a step; of several the largest is done."""

    NONE = 0
    SAVE = 1  # again, as the last save has failed
    ROLL_BACK = 2
    STOP = 3


class Vote:
    """What to do after a step: the same answer, at the same step, for all processes.

    Every process calls it once a step. With several, the devices find the answer (a
    maximum over all of them, queued behind the step), and it is read one call late, as
    the metrics are: nobody waits. jax's own service for this hears SIGTERM but not
    Ctrl-C, and swallows a SIGTERM that comes before the loop. Once it is to stop, it
    stays so.
    """

    def __init__(self, wanted: Callable[[], Request], mesh: Mesh):
        self.wanted, self.stopped = wanted, False
        self._asked: jax.Array | None = None
        if count() > 1:
            sharding = NamedSharding(mesh, jax.P(mesh.axis_names))
            self._ballots = {
                request: jax.make_array_from_callback(
                    (mesh.size,),
                    sharding,
                    lambda _, request=request: np.array([request]),
                )
                for request in Request
            }
            self._most = jax.jit(jnp.max)

    def reset(self) -> None:
        """Forgets what was asked last: the run has gone back since."""
        self._asked = None

    def __call__(self) -> Request:
        if count() == 1:
            answer = self.wanted()
        else:
            former = self._asked
            self._asked = self._most(self._ballots[self.wanted()])
            answer = Request.NONE if former is None else Request(int(former))
        self.stopped = self.stopped or answer is Request.STOP
        return Request.STOP if self.stopped else answer


# --- Ending ---------------------------------------------------------------------------


def finish() -> None:
    """Waits, however long, until all processes have come to their good end."""
    if count() > 1:
        agree({})  # the shutdown at exit would abort after 5 minutes
        if index() == 0:
            _set("failed", None)
        _watcher.join()  # a thread that Python's end finds in C++ would abort


def fail(message: str, status: int) -> NoReturn:
    """Prints the message, and ends all processes, telling the others why."""
    end_run(message, status, told=f"failed: {message}")


def end_run(message: str, status: int, *, told: str, stacks: bool = False) -> NoReturn:
    """Prints the message, and ends this process and, if there are any, all others.

    An exit as usual would wait for the others, who wait for this one in a computation.
    So nothing is unwound or waited for, and any thread may call it, whatever the main
    thread does. All processes end with `status`.

    Args:
        told: what the others print after "ended, as process 1 ".
        stacks: all of them print where their threads are, too.
    """
    _begin_ending(status)
    _print(message, stacks)
    if count() > 1:
        try:
            _set(
                "failed",
                {"process": index(), "told": told, "status": status, "stacks": stacks},
            )
        except jax.errors.JaxRuntimeError:
            pass  # another one was first, or process 0 is gone
    _end(status)


def watch() -> None:
    """From now on, ends this process when another one has failed."""
    _watcher.start()


def _watch() -> None:
    try:
        failed = _get("failed")
    except jax.errors.JaxRuntimeError:
        return  # process 0 is gone, which jax tells
    if failed is None:
        return
    _begin_ending(failed["status"])
    text = f"ended, as process {failed['process']} {failed['told']}"
    _print(text, failed["stacks"])
    _end(failed["status"])


_watcher = threading.Thread(target=_watch, name="peers", daemon=True)


def _begin_ending(status: int) -> None:
    """Returns in one thread only, the first to come; the others wait for the end."""
    _ending.acquire()  # for good
    # What follows can wait for ever: a lock of stderr, a store on a lost machine.
    timer = threading.Timer(ENDING, os._exit, (status,))
    timer.daemon = True
    timer.start()


def _print(text: str, stacks: bool) -> None:
    print(f"{prefix()}{text}", file=sys.stderr, flush=True)
    if stacks:
        faulthandler.dump_traceback(2)  # of all threads, to stderr


def _end(status: int) -> NoReturn:
    if count() > 1:
        # Without process 0 jax aborts the others: it is the last, and by a second.
        try:
            _client().wait_at_barrier("lm_scale/end", 5000)
        except jax.errors.JaxRuntimeError:
            pass  # one is dead
        if index() == 0:
            time.sleep(1)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # the cursor, which progress bars hide
    os._exit(status)
