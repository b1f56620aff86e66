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


def test_of_a_long_error_what_failed_and_why():
    path = "/a/rather/long/path" * 9
    error = OSError(f"Error writing {path!r}: {path}: No space left on device [28]")
    line = one_line(error, 100)
    assert len(line) <= 100
    assert line.startswith("Error writing") and line.endswith("left on device [28]")
    assert one_line(error, 1000) == str(error)
