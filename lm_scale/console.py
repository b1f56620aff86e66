# SPDX-License-Identifier: Apache-2.0
"""Plain lines on a rich console."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Prints a text as it is.

    Brackets in it (of paths, tokens, shapes) are no markup, numbers get no colours, and
    long lines are left to the terminal: in a file they stay whole.
    """
    console.print(text, markup=False, highlight=False, soft_wrap=True)
