# SPDX-License-Identifier: Apache-2.0
"""The one exception that a person, not a programmer, has to answer."""

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """A file, a flag or a config value is wrong.

    The message is complete by itself: the offending value, what was expected and what
    to do. The command line prints it without a traceback and exits with status 2.
    """


class Diverging(RuntimeError):
    """Training cannot go on sensibly; the message is complete by itself."""


class StorageError(OSError):
    """What was to be kept could not be written; the message is complete by itself."""


class SourceLost(OSError):
    """Text cannot be read on for now; the message is complete by itself."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error of a library says, without its line breaks; else its type's name.

    most: characters. Of more, those in the middle are left out: what failed stands at
    the beginning, and why it did often at the end ("No space left on device").
    """
    line = " ".join(str(error).split()) or type(error).__name__
    if most is None or len(line) <= most:
        return line
    half = (most - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Where two flat mappings differ, e.g. `batch: 16 there, 32 here`."""
    return [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; those in a list by their number."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
