# SPDX-License-Identifier: Apache-2.0
"""What has changed since a run was last at work: announced, or refused by name."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lm_scale.errors import flatten


@dataclass(frozen=True)
class Changes:
    """The fields in which two configs differ, by what that means for going on."""

    announced: tuple[str, ...]  # lines such as `log_every: 10 -> 20`
    refused: tuple[str, ...]  # lines such as `batch: 16 there, 32 here`
    overridable: tuple[str, ...]  # what `override` has to name to go on all the same
    made: dict[str, list[Any]]  # of those announced: name -> [there, here]


def compare(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    override: Collection[str] = (),
    *,
    free: Collection[str] = (),
    silent: Collection[str] = (),
    fixed: Mapping[str, str] | None = None,
    step: int | None = None,
) -> Changes:
    """The differences of two configs, as nested mappings of JSON values.

    Names are dotted; that of a part stands for all that is in it, and one without the
    numbers for all items of a list. Fields in `override` and in `free` may differ, and
    `steps` and `epochs` may grow. What is in `silent` is not even told.
    fixed: fields that no override can change, with the reason.
    step: where the run is, which `steps` cannot go below; None: not known.
    """
    old, new = flatten(there), flatten(here)
    changed = [
        name
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and not covers(silent, name)
    ]
    announced, refused, overridable, made = [], [], [], {}
    for name in changed:
        values = [old.get(name), new.get(name)]
        said = f"{name}: {values[0]!r} there, {values[1]!r} here"
        if covers(free, name):
            note = ""
        elif reason := _impossible(name, values, fixed or {}, step):
            refused.append(f"{said} ({reason}: no override helps)")
            continue
        elif name in ("steps", "epochs") and _grows(*values):
            note = _other_line(new)
        elif covers(override, name):
            note = " (overridden)"
        else:
            refused.append(said)
            overridable.append(name)
            continue
        announced.append(f"{name}: {values[0]!r} -> {values[1]!r}{note}")
        made[name] = values
    return Changes(tuple(announced), tuple(refused), tuple(overridable), made)


def covers(names: Collection[str], name: str) -> bool:
    """If a field, or a part of the config that it is in, is among the names."""
    forms = {name, without_numbers(name)}
    return any(form == x or form.startswith(f"{x}.") for x in names for form in forms)


def without_numbers(name: str) -> str:
    """`data.mixture.0.weight` as `data.mixture.weight`: of any item of the list."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def _impossible(
    name: str, values: list[Any], fixed: Mapping[str, str], step: int | None
) -> str:
    """Why the field cannot change at all; empty: it can."""
    for field, reason in fixed.items():
        if covers([field], name):
            return reason
    here = values[1]
    if name == "steps" and step is not None and here is not None and here < step:
        return f"the run is at step {step} already"
    return ""


def _grows(there: Any, here: Any) -> bool:
    return None not in (there, here) and here > there


def _other_line(new: Mapping[str, Any]) -> str:
    """What a longer run means for the learning rate."""
    decay = new.get("schedule.decay")
    if decay not in ("linear", "cosine"):
        return ""
    return (
        f" (the {decay} decay ends later: from here on the learning rate is that of "
        f"the longer run)"
    )
