# SPDX-License-Identifier: Apache-2.0
"""A plan on one page."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lm_scale.planning.accelerators import GIB
from lm_scale.planning.plan import Plan

UNKNOWN = "not known"


def page(plan: Plan) -> Group:
    """All of a plan that a person asks for."""
    parts: list[RenderableType] = [_head(plan), "", _verdict(plan), _memory(plan)]
    if plan.compiled.failure is not None:
        parts += ["", Text(plan.compiled.failure.message)]
    elif plan.times is not None and plan.chips.are_gpus:
        parts += ["", _bounds(plan), _at_most(plan)]
        if plan.compiled.program is not None:
            parts += ["", _collectives(plan)]
    elif plan.times is not None:
        parts += ["", _times(plan), Text(plan.accuracy, style="italic"), "",
                  _bounds(plan), "", _loops(plan), "", _collectives(plan), "",
                  _costliest(plan)]  # fmt: skip
    return Group(*parts)


def print_plan(plan: Plan, console: Console) -> None:
    """The page; long lines are folded."""
    console.print(page(plan), highlight=False)


def _rows(rows: list[tuple[str, str]], title: str = "") -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title=title)
    table.title_justify = "left"
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _head(plan: Plan) -> Table:
    chips = plan.chips
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh if size > 1) or "1"
    topology = f", topology {chips.topology}" if chips.topology else ""
    return _rows([
        ("slice", f"{chips.slice}: {chips.chips} chips, {chips.devices} devices "
                  f"({chips.kind}{topology})"),
        ("mesh", mesh),
        ("model", f"{plan.weights:,} weights; attention {plan.attention}"),
        ("step", f"{plan.tokens:,} tokens, {plan.flops / 1e12:,.1f} T model FLOPs "
                 f"({plan.formula})"),
        ("compiler", plan.compiled.made_by),
        *([("note", chips.note)] if chips.note else []),
    ])  # fmt: skip


def _verdict(plan: Plan) -> Text:
    spare, usable = plan.spare, gib(plan.chips.usable_hbm)
    if plan.reckoned is not None:
        if plan.fits:
            return Text(
                f"It should fit: {gib(spare or 0.0)} of {usable} a device would be "
                f"left, as reckoned.", "bold",
            )  # fmt: skip
        return Text(
            f"It should not fit into {usable}: by {gib(-(spare or 0.0))} a device, as "
            f"reckoned.", "bold red",
        )  # fmt: skip
    if plan.fits and spare is not None and spare >= 0:
        return Text(f"It fits: {gib(spare)} of {usable} a device are left.", "bold")
    if plan.fits:
        return Text(f"It compiles, with no part of {usable} a device left.", "bold")
    failure = plan.compiled.failure
    if failure is not None and not failure.out_of_memory:
        return Text("It cannot be compiled:", "bold red")
    over = "" if spare is None else f", by {gib(-spare)} a device or more"
    return Text(f"It does not fit into {usable}{over}:", "bold red")


def _memory(plan: Plan) -> Table:
    given, memory = plan.compiled.arguments, plan.compiled.memory
    parts = [
        ("weights", given.weights), ("optimizer state", given.optimizer),
        ("batch", given.batch),
    ]  # fmt: skip
    if memory is not None:
        parts += [
            ("padding of these", memory.padding),
            ("activations, temporaries", memory.temporaries),
            ("peak of a step", memory.peak), ("the program", memory.code),
        ]  # fmt: skip
    if plan.reckoned is not None:
        beside = plan.reckoned.peak - given.total
        parts += [("activations, gradients", beside),
                  ("peak of a step", plan.reckoned.peak)]  # fmt: skip
    if memory is not None and memory.host:
        parts.append(("offloaded, of the host", memory.host))
    return _rows([(name, gib(size)) for name, size in parts], "Memory of a device")


def _times(plan: Plan) -> Table:
    times, length = plan.times, plan.length
    assert times is not None
    cycles = plan.compiled.program.cycles if plan.compiled.program else 0
    clock = plan.chips.clock
    parts = f"{cycles / 1e6:,.1f} M cycles"
    if clock:
        parts += f" at {clock / 1e6:,.0f} MHz"
    if times.kernels:
        known = clock and plan.compiled.kernel_cycles is not None
        how = "as scheduled" if known else "at the peak"
        parts += f" + {seconds(times.kernels)} of attention in kernels, {how}"
    if times.waiting:
        parts += f" + {seconds(times.waiting)} for collectives that nothing hides"
    rows = [("step", f"{seconds(times.step)} = {parts}")]
    if plan.tokens_per_s is not None and plan.mfu is not None:
        rows.append(("speed", f"{plan.tokens_per_s:,.0f} tokens/s, MFU {plan.mfu:.1%}"))
    if length.steps is None:
        rows.append(("run", length.why))
    else:
        text = f"{length.steps:,} steps ({length.why})"
        if length.hours is not None and length.chip_hours is not None:
            text += f": {length.hours:,.1f} h, {length.chip_hours:,.0f} chip-hours"
        if length.cost is not None:
            text += f", {length.cost:,.2f} at the given price"
        rows.append(("run", text))
    return _rows(rows, "Estimated time")


def _bounds(plan: Plan) -> Table:
    times = plan.times
    assert times is not None
    how = "" if plan.reckoned is None else ", by the bytes as reckoned"
    at_peak = plan.flops / (plan.chips.devices * plan.chips.peak)
    whole = times.compute > 0.9 * at_peak  # or two thirds (time_model.seconds_at_peak)
    in_8_bits = "" if whole else ", two of three at twice that"
    table = _rows([], f"No step can be faster than{how} (the largest: {times.binds})")
    for name, text, value in (
        ("compute", f"the model's FLOPs at the peak{in_8_bits}", times.compute),
        ("hbm", "the bytes that the program reads and writes", times.hbm),
        ("ici", "the bytes that a device sends, over all its links", times.ici),
    ):
        table.add_row(name, f"{seconds(value)}  {text}")
    return table


def _at_most(plan: Plan) -> Table:
    """How fast the bounds let a run be; no estimate."""
    times, length = plan.times, plan.length
    assert times is not None
    rows = [("speed", f"at most {plan.tokens / times.least:,.0f} tokens/s")]
    if length.hours is None or length.chip_hours is None:
        return _rows([*rows, ("run", length.why)])
    text = f"{length.steps:,} steps ({length.why}): at least {length.hours:,.1f} h, "
    text += f"{length.chip_hours:,.0f} GPU-hours"
    if length.cost is not None:
        text += f", {length.cost:,.2f} at the given price"
    return _rows([*rows, ("run", text)])


def _loops(plan: Plan) -> Table:
    program = plan.compiled.program
    assert program is not None
    table = Table("cycles (M)", "share", "turns", "where", box=None, title="Loops")
    table.title_justify = "left"
    for loop in program.loops:
        where = f"{loop.scope} {loop.name}" if loop.name else "outside of all loops"
        if not loop.known:
            where += " (its number of turns was not found)"
        if loop.stacking:
            where += (
                f", {loop.stacking / loop.cycles:.0%} of it to fill and read stacks"
            )
        table.add_row(
            f"{loop.cycles / 1e6:,.2f}", f"{loop.cycles / program.cycles:.0%}",
            f"{loop.turns:,}", Text(where),
        )  # fmt: skip
    return table


def _collectives(plan: Plan) -> Table:
    program = plan.compiled.program
    assert program is not None
    table = Table(
        "collective", "mesh axes", "count", "MB, whole", "MB, sent", "MB, waited for",
        box=None, title="Collectives of a step",
    )  # fmt: skip
    table.title_justify = "left"
    for one in sorted(program.traffic, key=lambda one: -one.sent):
        table.add_row(
            one.kind, one.axes, f"{one.count:,}", f"{one.size / 1e6:,.1f}",
            f"{one.sent / 1e6:,.1f}", f"{one.waited / 1e6:,.1f}",
        )  # fmt: skip
    if not program.traffic:
        table.add_row("none", "", "", "", "", "")
    return table


def _costliest(plan: Plan) -> Table:
    program = plan.compiled.program
    assert program is not None
    table = Table(
        "cycles (M)", "share", "times", "source", "scope",
        box=None, title="The costliest instructions",
    )  # fmt: skip
    table.title_justify = "left"
    for one in program.costliest:
        table.add_row(
            f"{one.cycles / 1e6:,.2f}", f"{one.cycles / program.cycles:.1%}",
            f"{one.times:,}", Text(one.source), Text(one.scope, overflow="fold"),
        )  # fmt: skip
    return table


def gib(size: float) -> str:
    """Bytes in GiB, or what is small in MiB."""
    if abs(size) < GIB / 10:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / GIB:,.2f} GiB"


def seconds(value: float | None) -> str:
    """Seconds, or what is short in milliseconds."""
    if value is None:
        return UNKNOWN
    return f"{value:,.2f} s" if value >= 10 else f"{value * 1e3:,.1f} ms"
