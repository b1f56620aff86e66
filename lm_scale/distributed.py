# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: they connect, agree, wait for one another, and end.

Every process runs the same program and reaches the calls here in the same order. What
they tell one another before and beside the computation goes through the key-value store
of jax.distributed, which needs no devices. Process 0 alone prints and writes files.
With a single process nothing here does anything.
"""

import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # no public name
from jax._src.distributed import global_state  # nor for the store's client
from jax.sharding import Mesh, NamedSharding

from lm_scale import __version__
from lm_scale.cluster import Place, find_place, parse_address, take_flags
from lm_scale.errors import InputError

T = TypeVar("T")
VISIBLE = 60  # s that a network file system may take to show another machine's files
_calls = itertools.count()  # the same call has the same number on every process
_ending = threading.Lock()  # the first thread to take it ends the process


def index() -> int:
    """The number of this process; touches no device, unlike jax.process_index()."""
    return global_state.process_id


def count() -> int:
    """The number of processes."""
    return global_state.num_processes


# --- Connecting -----------------------------------------------------------------------


def connect(command: str, argv: list[str]) -> list[str]:
    """Joins the other processes, if there are any; returns argv without the flags.

    To be called before anything touches a device. Raises InputError for flags that
    cannot be, and if not all processes run the same command and code.
    """
    given, rest = take_flags(argv)
    if {"-h", "--help"} & set(rest):
        return rest
    place = find_place(given, os.environ, tpu=running_in_cloud_tpu_vm)
    if place is not None:
        _join(place)
        _watcher.start()
        if index() > 0:  # silent, but for errors; what C++ prints as well
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        agree({"command": command, "number of processes": count(), **code_facts()})
    return rest


def _join(place: Place) -> None:
    if place.process_id == 0 and place.coordinator is not None:
        _check_port(place.coordinator)
    # A connection that fails aborts the process with a stack of C++: be first.
    timer = threading.Timer(place.start_timeout, _give_up, (place,))
    timer.daemon = True
    timer.start()
    # It would take SIGTERM for itself, whatever the process does; see StopVote.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            place.local_devices,
            cluster_detection_method="deactivate" if place.coordinator else None,
            initialization_timeout=place.start_timeout + 60,
            heartbeat_timeout_seconds=place.peer_timeout,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise InputError(
            f"jax cannot connect the processes that were started here ({error}). Give "
            f"--coordinator, --process_id and --num_processes."
        ) from error
    finally:
        timer.cancel()


def _check_port(coordinator: str) -> None:
    """InputError if process 0 cannot listen there: jax would crash."""
    port = parse_address(coordinator)[1]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise InputError(
            f"coordinator = {coordinator}: process 0 cannot listen at port {port} "
            f"({error.strerror}). Give another port to all processes."
        ) from error


def _give_up(place: Place) -> None:
    address = global_state.coordinator_address
    reason = f"nothing answers at {address}"
    if place.process_id == 0:
        reason = "some have not come"
    elif address is not None and _answers(address):
        reason = f"process 0 answers at {address}, but others have not come"
    print(
        f"lm-scale: the processes were not connected within {place.start_timeout} s: "
        f"{reason}. Start all of them, with the same --coordinator and "
        f"--num_processes, or allow for more by --start_timeout.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(2)


def _answers(address: str) -> bool:
    host, port = parse_address(address)
    try:
        socket.create_connection((host.strip("[]"), port), timeout=2).close()
    except OSError:
        return False
    return True


# --- Agreeing -------------------------------------------------------------------------


def agree(facts: Mapping[str, Any]) -> None:
    """Waits for all processes; InputError on each of them if their facts differ."""
    if count() == 1:
        return
    call = next(_calls)
    _set(f"{call}/{index()}", dict(facts))
    if index() == 0:
        told = [_get(f"{call}/{process}") for process in range(count())]
        _set(f"{call}/found", disagreements(told))
    found = _get(f"{call}/found")
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


def code_facts() -> dict[str, str]:
    """What tells that two processes run the same code."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return {
        "lm_scale version": __version__,
        "hash of lm_scale's source": digest.hexdigest()[:12],
        "jax version": jax.__version__,
    }


def check_devices(settings: Mapping[str, Any]) -> None:
    """InputError unless all processes have the same settings and the same devices.

    The first call to touch the devices.
    """
    if jax.process_count() != count():
        raise InputError(
            f"jax sees {jax.process_count()} processes, which are not connected. Give "
            f"--coordinator, --process_id and --num_processes to each."
        )
    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    agree(
        {
            "device kind": ", ".join(kinds),
            "number of devices": len(devices),
            **settings,
        }
    )


def open_connections(mesh: Mesh) -> None:
    """Lets every group of devices along the mesh's axes compute something together.

    CPUs only: gloo lets a group's processes wait 30 s for one another when they first
    meet, and one may be compiling for longer while another has found its program in the
    compilation cache (which, on CPUs, jax keeps for process 0 alone).
    """
    if count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [
        group
        for size in range(1, len(axes) + 1)
        for group in itertools.combinations(axes, size)
    ]
    everywhere = jax.P(mesh.axis_names)
    meet = jax.shard_map(
        lambda x: sum(jax.lax.psum(x, group) for group in groups),
        mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False,
    )  # fmt: skip
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, everywhere), lambda _: np.ones(1, np.int32)
    )
    jax.block_until_ready(jax.jit(meet)(ones))


# --- Waiting --------------------------------------------------------------------------


def from_first(value: T) -> T:
    """Process 0's value (of JSON), for which the others wait, however long it takes."""
    if count() == 1:
        return value
    key = str(next(_calls))
    if index() == 0:
        _set(key, value)
    return _get(key)


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


def see(path: Path) -> Path:
    """The path, once this process sees it; InputError if it does not."""
    if not _appears(path):
        raise InputError(
            f"There is no {path} here, which process 0 has written. The run's folders "
            f"must be shared by all processes."
        )
    return path


def _appears(path: Path) -> bool:
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
    while True:
        try:
            second = 1000  # ms; Python hears a signal only between two calls
            value = _client().blocking_key_value_get(f"lm_scale/{key}", second)
            return json.loads(value)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


class StopVote:
    """Whether any process was told to stop: the same answer, at the same step, for all.

    Every process calls it once a step. With several, the devices find the answer (a
    maximum over all of them, queued behind the step), and it is read one call late, as
    the metrics are: nobody waits. jax's own service for this hears SIGTERM but not
    Ctrl-C, and swallows a SIGTERM that comes before the loop.
    """

    def __init__(self, told: threading.Event, mesh: Mesh):
        self.told, self.stopped = told, False
        self._asked: jax.Array | None = None
        if count() > 1:
            sharding = NamedSharding(mesh, jax.P(mesh.axis_names))
            self._ballots = [
                jax.make_array_from_callback(
                    (mesh.size,), sharding, lambda _, vote=vote: np.array([vote])
                )
                for vote in (0, 1)
            ]
            self._any = jax.jit(jnp.max)

    def __call__(self) -> bool:
        if count() == 1:
            self.stopped = self.told.is_set()
            return self.stopped
        former = self._asked
        self._asked = self._any(self._ballots[self.told.is_set()])
        self.stopped = self.stopped or (former is not None and bool(former))
        return self.stopped


# --- Ending ---------------------------------------------------------------------------


def finish() -> None:
    """Waits, however long, until all processes have come to their good end."""
    if count() > 1:
        agree({})  # the shutdown at exit would abort after 5 minutes
        if index() == 0:
            _set("failed", None)
        _watcher.join()  # a thread that Python's end finds in C++ would abort


def fail(message: str, status: int) -> NoReturn:
    """Prints the message, and ends this and, telling them why, all other processes.

    An exit as usual would wait for the others, who wait for this one in a computation.
    """
    _ending.acquire()  # for good
    print(f"{_name()}{message}", file=sys.stderr, flush=True)
    try:
        _set("failed", {"process": index(), "message": message, "status": status})
    except jax.errors.JaxRuntimeError:
        pass  # another one was first, or process 0 is gone
    _end(status)


def _watch() -> None:
    """Ends this process when another one has failed."""
    try:
        failed = _get("failed")
    except jax.errors.JaxRuntimeError:
        return  # process 0 is gone, which jax tells
    if failed is None:
        return
    _ending.acquire()
    print(
        f"{_name()}ended, as process {failed['process']} failed: {failed['message']}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    _end(failed["status"])


_watcher = threading.Thread(target=_watch, name="peers", daemon=True)


def _name() -> str:
    return f"process {index()}: " if index() > 0 else ""


def _end(status: int) -> NoReturn:
    # Without process 0 jax aborts the others: it is the last, and by a second.
    try:
        _client().wait_at_barrier("lm_scale/end", 5000)
    except jax.errors.JaxRuntimeError:
        pass  # one is dead
    if index() == 0:
        time.sleep(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
