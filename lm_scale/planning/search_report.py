# SPDX-License-Identifier: Apache-2.0
"""What a search found: a table, and the trade between memory and time as a picture."""

import html
import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from lm_scale.console import say
from lm_scale.errors import InputError
from lm_scale.planning.accelerators import GIB
from lm_scale.planning.report import gib, seconds
from lm_scale.planning.search import Search, Tried

PICTURES = (".png", ".html")
COLUMNS = (
    "mesh", "rules", "remat", "accumulate", "memory", "step", "tokens/s", "MFU"
)  # fmt: skip


class Progressing:
    """How far a search is: a bar where there is a terminal, else a line a candidate."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(),
            MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("compiling", total=None)
        self._done, self._best = 0, 0.0

    def __enter__(self) -> "Progressing":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def tell(self, tried: Tried, total: int) -> None:
        """One more of so many was tried."""
        self._done += 1
        self._best = max(self._best, tried.tokens_per_s or 0.0)
        text = f"compiling, best so far {self._best:,.0f} tokens/s"
        self._bar.update(self._task, description=text, completed=self._done,
                         total=total)  # fmt: skip
        if not self._console.is_terminal:
            say(self._console, f"{self._done}/{total} {'  '.join(cells(tried))}")


def print_search(found: Search, console: Console) -> None:
    """The table, and what was left out."""
    table = Table(*COLUMNS, box=None)
    for one in found.tried:
        table.add_row(*cells(one), style="bold" if one is found.best else None)
    console.print(table, highlight=False)
    if any(one.own for one in found.tried):
        say(console, "*: what the config says now")
    say(console, left_out(found))
    say(console, found.accuracy)
    if found.best is None:
        say(console, f"Nothing fits {found.slice}: a device has {gib(found.usable)}.")


def left_out(found: Search) -> str:
    """Of how many candidates these are the tried ones, and why."""
    text = f"{len(found.tried)} of {found.candidates:,} candidates were tried"
    if found.too_large:
        text += f"; {found.too_large:,} are too large by a reckoning"
    if found.hopeless:
        text += f"; {found.hopeless:,} hold more than one that was too large"
    if found.left:
        text += f"; {found.left:,} were not (--budget N tries more)"
    return text + "."


def cells(one: Tried) -> list[str]:
    """A row of the table."""
    choice = one.candidate
    mark = " *" if one.own else ""
    row = [f"{choice.mesh_text}{mark}", choice.rules, choice.remat,
           str(choice.accumulate)]  # fmt: skip
    if one.fits and one.memory is not None:
        return [
            *row, gib(one.memory), seconds(one.step), f"{one.tokens_per_s:,.0f}",
            f"{one.mfu:.1%}",
        ]  # fmt: skip
    if one.memory is not None:
        return [*row, f"{gib(one.memory)} or more", "too large", "", ""]
    return [*row, "", one.failure or "", "", ""]


def front(tried: Iterable[Tried]) -> list[Tried]:
    """Those that no other one beats in both, by memory: each faster than the last."""
    fit = [one for one in tried if one.fits and one.step is not None]
    found: list[Tried] = []
    for one in sorted(fit, key=lambda one: (one.memory, one.step)):
        if not found or _step(one) < _step(found[-1]):
            found.append(one)
    return found


def _step(one: Tried) -> float:
    assert one.step is not None
    return one.step


def check_picture(path: str) -> None:
    """InputError if no picture can be written to such a file, or nothing draws it."""
    if Path(path).suffix not in PICTURES:
        raise InputError(
            f"--plot {path!r}: expected a name that ends in {' or '.join(PICTURES)}."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"--plot {path}: matplotlib, which draws it, is not installed. "
            f"pip install matplotlib, or lm_scale[plan], or leave --plot out."
        )


def write_picture(found: Search, path: str) -> None:
    """Memory against step time, as PNG, or as a page with the table below."""
    figure = draw(found)
    if Path(path).suffix == ".png":
        figure.savefig(path, dpi=150)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    Path(path).write_text(page(found, drawn.getvalue()), "utf-8")


def draw(found: Search) -> Any:
    """The figure: a point a candidate that fits, the front as a line, labelled."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    fit = [one for one in found.tried if one.fits and one.memory is not None]
    for rules in dict.fromkeys(one.candidate.rules for one in fit):
        ones = [one for one in fit if one.candidate.rules == rules]
        axes.scatter(
            [(one.memory or 0.0) / GIB for one in ones],
            [_step(one) * 1e3 for one in ones], label=rules,
        )  # fmt: skip
    best = front(found.tried)
    places = [((one.memory or 0.0) / GIB, _step(one) * 1e3) for one in best]
    axes.plot(*zip(*places, strict=True), "--", color="gray", label="Pareto front")
    for one, place in zip(best, places, strict=True):
        axes.annotate(short(one), place, xytext=(6, 4), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    axes.axvline(found.usable / GIB, color="black", lw=1, label="what a device has")
    axes.set_xlabel("memory of a device (GiB)")
    axes.set_ylabel("estimated time of a step (ms)")
    axes.set_title(f"{found.slice}: {len(fit)} of {len(found.tried)} tried fit")
    axes.legend()
    return figure


def short(one: Tried) -> str:
    """A candidate as a label."""
    choice = one.candidate
    return f"{choice.mesh_text}, {choice.remat}, ×{choice.accumulate}"


def page(found: Search, svg: str) -> str:
    """A page that needs nothing else."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in cells(one)) + "</tr>\n"
        for one in found.tried
    )
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    words = html.escape(" ".join(found.overrides) or "nothing fits")
    return (
        f"<!DOCTYPE html>\n<meta charset='utf-8'><title>{found.slice}</title>\n"
        f"<style>body {{ font-family: sans-serif }} td, th {{ padding: 0 1em;"
        f" text-align: left }}</style>\n{svg[svg.index('<svg') :]}\n"
        f"<p><code>{words}</code></p>\n<table><tr>{heads}</tr>\n{rows}</table>\n"
        f"<p>{html.escape(left_out(found))} {html.escape(found.accuracy)}</p>\n"
    )
