# SPDX-License-Identifier: Apache-2.0
"""How errors of libraries are told."""

import pytest

from lm_scale.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no\n  such\tfile\n"), "no such file"),
        (TimeoutError(), "TimeoutError"),
        (KeyboardInterrupt(" \n"), "KeyboardInterrupt"),
    ],
)
def test_one_line_of_an_error(error, line):
    assert one_line(error) == line
