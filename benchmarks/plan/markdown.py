# SPDX-License-Identifier: Apache-2.0
"""Tables in a README that a script writes: what stands between two comments."""

import re
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, one line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(path: Path, name: str, text: str) -> None:
    """Replaces what is between `<!-- name -->` and `<!-- end of name -->`.

    Raises ValueError if the file has no such place.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    place = re.compile(rf"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    whole, count = place.subn(
        lambda _: f"{begin}\n{text}\n{end}", path.read_text("utf-8")
    )
    if count != 1:
        raise ValueError(f"{path}: {count} places between {begin} and {end}, not 1.")
    path.write_text(whole, "utf-8")
