# SPDX-License-Identifier: Apache-2.0
"""The table in README.md: every case has its tests, and they are there."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \| .* \| (.*) \|$", (HERE / "README.md").read_text(), re.MULTILINE
)


def test_every_case_is_in_the_table():
    # 36 is of the launchers, which have tests of their own.
    assert [int(case) for case, _ in ROWS] == list(range(1, 36))


def test_every_test_in_the_table_exists():
    for case, tests in ROWS:
        for test in tests.split(", "):
            file, _, name = test.partition("::")
            source = (HERE / f"{file}.py").read_text()
            assert f"\ndef {name}(" in source, f"case {case}: {test}"
