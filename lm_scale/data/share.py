# SPDX-License-Identifier: Apache-2.0
"""What a config says of a mixture: its sources, by name, and how much of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.mixture import parts_of
from lm_scale.errors import InputError

# What a token store, or the folder of several, has in it under these names.
_TAKEN = ("tokenizer", "train", "validation", "plans", "parts", "work")


@dataclass(frozen=True)
class Share:
    """One source of a mixture."""

    name: str  # of the folder of its tokens too, and in the logs
    weight: float  # of its examples, in any unit: 7, 2 and 1 are 70, 20 and 10 %
    corpus: CorpusConfig = CorpusConfig()


def check_shares(shares: Sequence[Share]) -> None:
    """InputError unless all weights are above 0, all names different and folders'."""
    seen: dict[str, str] = {}
    for share in shares:
        name = share.name
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name):
            raise InputError(
                f"data.mixture: a source is called {name!r}; expected 1 to 64 letters, "
                "digits, - and _, a letter first."
            )
        if name.lower() in _TAKEN:
            raise InputError(
                f"data.mixture: a source is called {name!r}, but a folder of that name "
                "has another meaning beside it. Choose another name."
            )
        if name.lower() in seen:  # some file systems take them for one
            raise InputError(
                f"data.mixture: two sources are called {seen[name.lower()]!r} and "
                f"{name!r}; expected names that differ, not in their case alone."
            )
        seen[name.lower()] = name
    try:
        parts_of([share.weight for share in shares])
    except InputError as error:
        raise InputError(f"data.mixture: {error}") from None
