# SPDX-License-Identifier: Apache-2.0
"""Processes that make plans side by side: one that dies costs one plan."""

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax

from lm_scale.config import RunConfig
from lm_scale.errors import one_line
from lm_scale.planning.plan import Plan, make_plan

Key = TypeVar("Key")


@dataclass(frozen=True)
class Failed:
    """Why there is no plan; the compiler's own refusals are plans (`fits` False)."""

    message: str


def make_plans(
    configs: Iterator[tuple[Key, RunConfig]],
    slice_name: str,
    *,
    jobs: int,
    cache: Path | None = None,
) -> Iterator[tuple[Key, Plan | Failed]]:
    """The plans of these configs, as they are finished, by so many processes.

    configs: a config is taken from it when a process is free to plan it. cache: see
    `make_plan`. The processes end with the iteration, also where it is broken off.
    """
    context = multiprocessing.get_context("spawn")  # jax has threads: none may fork
    workers: list[_Worker] = []
    try:
        while True:
            idle = [worker for worker in workers if worker.key is None]
            while len(workers) - len(idle) < jobs and (task := next(configs, None)):
                worker = idle.pop() if idle else _Worker(context, slice_name, cache)
                if worker not in workers:
                    workers.append(worker)
                worker.give(*task)
            busy = [worker for worker in workers if worker.key is not None]
            if not busy:
                return
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    key, result = worker.take()
                    if not worker.lives:
                        workers.remove(worker)
                    yield key, result
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


class _Worker(Generic[Key]):
    """A process, and the key of the config that it plans; None: it waits for one."""

    def __init__(self, context: Any, slice_name: str, cache: Path | None):
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(other, slice_name, cache), daemon=True
        )
        self.process.start()
        other.close()  # so that the end of the process is the end of the connection
        self.key: Key | None = None
        self.lives = True

    def give(self, key: Key, config: RunConfig) -> None:
        """A config to plan."""
        self.key = key
        try:
            self.connection.send(config)
        except OSError:  # it has died meanwhile: `take` says so
            pass

    def take(self) -> tuple[Key, Plan | Failed]:
        """The result; waits for it."""
        key, self.key = self.key, None
        assert key is not None
        try:
            return key, self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.lives = False
            return key, Failed(f"its compiler died: {ending(self.process.exitcode)}")


def ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    often = ", often for want of memory" if name == "SIGKILL" else ""
    return f"{name}{often}"


def serve(connection: Connection, slice_name: str, cache: Path | None) -> None:
    """Plans one config after the other that comes, until none will."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: who started it will end it
    jax.config.update("jax_platforms", "cpu")  # it compiles for others than are here
    while True:
        try:
            config = connection.recv()
        except EOFError:
            return
        connection.send(plan_or_reason(config, slice_name, cache))


def plan_or_reason(
    config: RunConfig, slice_name: str, cache: Path | None
) -> Plan | Failed:
    """The plan, or what keeps it from being made: no error may end a search."""
    try:
        return make_plan(config, slice_name, cache=cache)
    except Exception as error:
        return Failed(f"{type(error).__name__}: {one_line(error, 300)}")
