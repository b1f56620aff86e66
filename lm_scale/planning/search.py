# SPDX-License-Identifier: Apache-2.0
"""The best mesh, rules, remat policy and accumulation for a config, by compiling.

candidates.py lists what keeps the global batch -> memory_model.py leaves out what is
surely too large -> time_model.py says which are promising -> workers.py compiles these
-> those that fit are ranked by their estimated tokens/s.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lm_scale.config import RunConfig
from lm_scale.errors import InputError
from lm_scale.planning.accelerators import Slice
from lm_scale.planning.candidates import (
    Candidate,
    Space,
    find_candidates,
    layout_of,
    own_choice,
    rules_of,
)
from lm_scale.planning.libtpu import topology_devices
from lm_scale.planning.memory_model import MemoryModel
from lm_scale.planning.plan import ACCURACY, Plan
from lm_scale.planning.time_model import estimate_seconds
from lm_scale.planning.workers import Failed, make_plans
from lm_scale.sharding import make_mesh

BUDGET = 16  # candidates that are compiled: minutes for small models, else an hour


@dataclass(frozen=True)
class Prospect:
    """A candidate before it is compiled."""

    candidate: Candidate
    memory: int  # bytes of a device, by the memory model
    seconds: float  # of a step, by the time model
    too_large: bool  # surely
    own: bool  # what the config says now


@dataclass(frozen=True)
class Tried:
    """A candidate and its plan, in figures; None: not known, or it does not fit."""

    candidate: Candidate
    own: bool  # what the config says now
    fits: bool
    estimate: int  # bytes of a device, by the memory model
    memory: float | None  # bytes of a device, by the compiler
    step: float | None  # seconds
    tokens_per_s: float | None
    mfu: float | None
    failure: str | None  # why it does not fit


@dataclass(frozen=True)
class Search:
    """What was found on a slice."""

    slice: str
    usable: float  # bytes of a device that programs get
    candidates: int
    too_large: int  # surely, by the memory model
    hopeless: int  # as one like them, with less to hold, did not fit
    tried: tuple[Tried, ...]  # those that fit come first, the fastest first of all
    overrides: tuple[str, ...]  # of the best; empty: nothing fits
    accuracy: str = ACCURACY

    @property
    def best(self) -> Tried | None:
        """The fastest of those that fit."""
        return self.tried[0] if self.tried and self.tried[0].fits else None

    @property
    def left(self) -> int:
        """How many were not compiled for want of a larger budget."""
        return self.candidates - self.too_large - self.hopeless - len(self.tried)


def search(
    config: RunConfig,
    chosen: Slice,
    space: Space,
    *,
    budget: int,
    jobs: int,
    cache: Path | None = None,
    tell: Callable[[Tried, int], None] = lambda tried, total: None,
) -> Search:
    """Compiles the `budget` most promising candidates, and ranks them.

    jobs: processes. cache: see `make_plan`: what is in it is not compiled again, so a
    search that was broken off goes on. tell: hears of each candidate that was tried,
    and how many will be at most.
    Raises InputError if no candidate can cut the config's batch and weights, or if
    there is no time to rank by.
    """
    if chosen.generation.is_gpu:
        raise InputError(
            f"--search ranks by the compiler's cycles, which there are of TPUs only. "
            f"Plan single meshes for {chosen.name}: leave out --search, add --mesh."
        )
    if chosen.generation.clock is None:
        raise InputError(
            f"--search ranks by the time of a step, and the clock of a "
            f"{chosen.generation.name} is not published. Plan single meshes for it, or "
            f"search on another slice."
        )
    prospects = weigh(config, chosen, space)
    course = Course(prospects, chosen.usable_hbm, budget)
    tasks = ((one, one.candidate.of(config)) for one in course.next())
    count = min(budget, sum(not one.too_large for one in prospects))
    tried: list[Tried] = []
    plans = make_plans(tasks, chosen.name, jobs=jobs, cache=cache)
    for prospect, plan in plans:
        course.hear(prospect, plan)
        tried.append(figures(prospect, plan))
        tell(tried[-1], max(count, len(tried)))
    tried.sort(key=lambda one: (not one.fits, -(one.tokens_per_s or 0.0)))
    fits = bool(tried) and tried[0].fits
    return Search(
        slice=chosen.name,
        usable=chosen.usable_hbm,
        candidates=len(prospects),
        too_large=sum(one.too_large and one not in course.given for one in prospects),
        hopeless=len(course.hopeless),
        tried=tuple(tried),
        overrides=tuple(tried[0].candidate.overrides(config)) if fits else (),
    )


def weigh(config: RunConfig, chosen: Slice, space: Space) -> list[Prospect]:
    """All candidates, with what the models say of them.

    Raises InputError if there is none.
    """
    devices = topology_devices(chosen)
    try:
        own = same_as(own_choice(config, devices), config)
    except InputError:  # the config's own mesh is for other slices
        own = None
    model, found = MemoryModel(), []
    mesh_of = functools.cache(lambda shape: make_mesh(shape, devices))
    for candidate in find_candidates(config, devices, space):
        variant, mesh = candidate.of(config), mesh_of(candidate.mesh)
        memory = model.estimate(variant, mesh)
        found.append(
            Prospect(
                candidate,
                memory.peak,
                estimate_seconds(variant, chosen, mesh, memory),
                too_large=memory.least > chosen.usable_hbm,
                own=same_as(candidate, config) == own,
            )
        )
    if not found:
        raise InputError(
            f"no mesh of {chosen.devices} devices ({chosen.name}) cuts a batch of "
            f"{config.batch} and the weights evenly, with rules "
            f"{', '.join(space.rules)}. Change `batch`, or the slice."
        )
    return found


def same_as(candidate: Candidate, config: RunConfig) -> tuple:
    """Equal for candidates that are one, by whatever names."""
    rules = rules_of(candidate.rules, config)
    layout = layout_of(rules, candidate.mesh)
    return layout, candidate.remat, candidate.accumulate


def figures(prospect: Prospect, plan: Plan | Failed) -> Tried:
    """What became of a candidate."""
    candidate, own, estimate = prospect.candidate, prospect.own, prospect.memory
    if isinstance(plan, Failed):
        return Tried(
            candidate, own, False, estimate, None, None, None, None, plan.message
        )
    memory, failure = plan.compiled.memory, plan.compiled.failure
    if failure is not None:
        reason = failure.message.partition("\n")[0]
        return Tried(
            candidate, own, False, estimate, failure.needed, None, None, None, reason
        )
    assert memory is not None and plan.times is not None
    return Tried(
        candidate, own, plan.fits, estimate, memory.peak + memory.code,
        plan.times.step, plan.tokens_per_s, plan.mfu, None,
    )  # fmt: skip


@dataclass
class Course:
    """Which candidate is compiled next, and what was learnt from those before."""

    prospects: list[Prospect]
    usable: float  # bytes of a device
    budget: int
    given: list[Prospect] = field(default_factory=list)
    refused: list[Prospect] = field(default_factory=list)  # by the compiler: too large
    hopeless: list[Prospect] = field(default_factory=list)
    fits: bool = False  # something does

    def next(self) -> Iterator[Prospect]:
        """The config's own choice, then by promise; at last what needs the least.

        The latter only where nothing else fits, so that this is not said lightly.
        """
        possible = [one for one in self.prospects if not one.too_large]
        for one in sorted(possible, key=self.promise):
            if len(self.given) == self.budget:
                break
            if any(is_harder(one, than) for than in self.refused):
                self.hopeless.append(one)
                continue
            self.given.append(one)
            yield one
        least = min(self.prospects, key=lambda one: one.memory)
        if not self.fits and least not in self.given:
            self.given.append(least)
            yield least

    def promise(self, one: Prospect) -> tuple[bool, float]:
        """The lower, the sooner: seconds, and more where it may well not fit."""
        return not one.own, one.seconds * max(1.0, one.memory / self.usable)

    def hear(self, prospect: Prospect, plan: Plan | Failed) -> None:
        """What became of one."""
        if isinstance(plan, Failed):
            return
        self.fits |= plan.fits
        failure = plan.compiled.failure
        if failure is not None and failure.out_of_memory:
            self.refused.append(prospect)


def is_harder(one: Prospect, than: Prospect) -> bool:
    """If it is cut like the other, and has as much or more to hold."""
    alike = (one.candidate.mesh, one.candidate.rules) == (
        than.candidate.mesh, than.candidate.rules,
    )  # fmt: skip
    return alike and one.memory >= than.memory
