# SPDX-License-Identifier: Apache-2.0
"""configs/README.md: a plan for every config that names a slice, as it is now."""

import pytest

from benchmarks.plan.configs import KEPT, README, entries, measures, settings
from benchmarks.plan.markdown import put
from benchmarks.plan.rows import load
from lm_scale.planning.plan import ACCURACY

AGAIN = "Run `python -m benchmarks.plan.configs` (--fresh, if only the config changed)."


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_the_plan_of_a_config_is_that_of_its_settings(entry):
    lines = README.read_text("utf-8").splitlines()
    begin = f"| {' | '.join(settings(entry))} | "
    found = [line for line in lines if line.startswith(begin)]
    assert len(found) == 1, f"{README} lacks the line `{begin}`. {AGAIN}"
    assert found[0] == f"{begin}{' | '.join(measures(load(KEPT).get(entry.name)))} |"


def test_the_table_has_no_other_plans_and_says_how_good_they_are():
    text = README.read_text("utf-8")
    assert sum(line.startswith("| `") for line in text.splitlines()) == len(entries())
    assert ACCURACY in text


def test_a_table_needs_its_place(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- here -->\nold\n<!-- end of here -->\nafter\n")
    put(path, "here", r"new \1")
    assert path.read_text() == (
        "before\n<!-- here -->\nnew \\1\n<!-- end of here -->\nafter\n"
    )
    with pytest.raises(ValueError, match="0 places"):
        put(path, "there", "new")
