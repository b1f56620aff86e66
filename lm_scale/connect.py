# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run come together: they connect, and compare what they are."""

import hashlib
import itertools
import os
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # no public name
from jax._src.distributed import global_state  # nor for where process 0 listens
from jax.sharding import Mesh, NamedSharding

from lm_scale import __version__
from lm_scale.cluster import Place, find_place, parse_address, take_flags
from lm_scale.distributed import agree, count, index, watch
from lm_scale.errors import InputError


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
        watch()
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
    # It would take SIGTERM for itself, whatever the process does; see Vote.
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
