#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a command as several processes of one run, on this machine.

    launch/local.py -n 2 --devices 4 -- lm-scale train configs/quickstart.py

Each line of output gets its process's number before it. When a process fails all are
ended, and its exit status is this command's. Ctrl-C and SIGTERM go to all of them; the
second one ends them at once. Needs nothing but Python.
"""

import argparse
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 5.0  # s for the others to end by themselves when one has failed


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the status of the first process that failed, or 0."""
    options = parse(sys.argv[1:] if argv is None else argv)
    command = resolve(options.command)
    number, port = options.processes, options.port or free_port()
    children: list[subprocess.Popen] = []

    def forward(received: int, frame) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(received)

    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, forward)
    try:
        for index in range(number):
            env = environment(index, number, port, options.devices)
            children.append(start(command, env))
        readers = [
            threading.Thread(target=copy, args=(stream, out, f"[{index}] "))
            for index, child in enumerate(children)
            for stream, out in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
        ]
        for reader in readers:
            reader.start()
        status = wait(children, options.grace)
    finally:
        for child in children:  # with the children that they may have left
            signal_group(child, signal.SIGKILL)
            child.wait()
    for reader in readers:
        reader.join()
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    about, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description=about, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("-n", "--processes", type=int, default=2, help="how many (2)")
    add("--devices", type=int, help="CPU devices to simulate in each of them")
    add("--port", type=int, help="where process 0 listens (a free one)")
    add("--grace", type=float, default=10.0, help="seconds from TERM to KILL (10)")
    add("command", nargs="+", help="after --: what to run, lm-scale COMMAND ...")
    options = parser.parse_args(argv)
    if options.processes < 1 or (options.devices is not None and options.devices < 1):
        parser.error("expected 1 or more processes and devices")
    return options


def resolve(command: list[str]) -> list[str]:
    """The command, with this checkout's `lm-scale` where none is installed."""
    if command[0] == "lm-scale" and shutil.which("lm-scale") is None:
        return [sys.executable, "-m", "lm_scale", *command[1:]]
    return command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(
    index: int, number: int, port: int, devices: int | None
) -> dict[str, str]:
    """What tells a process its place: see lm_scale/cluster.py."""
    env = {
        **os.environ,
        "LM_SCALE_COORDINATOR": f"127.0.0.1:{port}",
        "LM_SCALE_PROCESS_ID": str(index),
        "LM_SCALE_NUM_PROCESSES": str(number),
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if importlib.util.find_spec("lm_scale") is None:
        paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    return env


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen:
    """A process in a session of its own: the terminal's Ctrl-C comes only to us."""
    try:
        return subprocess.Popen(
            command, env=env, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    except OSError as error:
        raise SystemExit(
            f"launch/local.py: cannot start {command[0]}: {error}"
        ) from error


def end_with_parent() -> None:
    """Linux kills the process if this one dies without a chance to."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_whole_lines = threading.Lock()


def copy(stream: IO[str], out: IO[str], prefix: str) -> None:
    for line in stream:
        with _whole_lines:
            out.write(prefix + line.rstrip("\n") + "\n")
            out.flush()


def wait(children: list[subprocess.Popen], grace: float) -> int:
    """Until all have ended, by force if one has failed; the first failure's status."""
    status, deadline, force = 0, float("inf"), [signal.SIGTERM, signal.SIGKILL]
    while any(child.poll() is None for child in children):
        if status == 0 and (failed := failure(children)) is not None:
            status = failed
            deadline = time.monotonic() + PATIENCE
        if force and time.monotonic() > deadline:
            for child in children:
                signal_group(child, force[0])
            del force[0]
            deadline = time.monotonic() + grace
        time.sleep(0.1)
    return status or failure(children) or 0


def failure(children: list[subprocess.Popen]) -> int | None:
    """The status of a process that has failed, as a shell gives it; None: none has."""
    for index, child in enumerate(children):
        status = child.poll()
        if status:
            cause = f"ended with {status}"
            if status < 0:
                cause = f"was killed by signal {-status}"
            print(f"launch/local.py: process {index} {cause}", file=sys.stderr)
            return status if status > 0 else 128 - status
    return None


def signal_group(child: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):  # it has ended, with all of its own
        pass


if __name__ == "__main__":
    sys.exit(main())
