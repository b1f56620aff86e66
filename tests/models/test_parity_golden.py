# SPDX-License-Identifier: Apache-2.0
"""The same numbers as transformers had in torch (tests/golden/make.py), without it."""

from pathlib import Path

import numpy as np
import parity
import pytest

from lm_scale import hf

GOLDEN = Path(__file__).parent.parent / "golden"


def part(content, prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): content[name]
        for name in content
        if name.startswith(prefix)
    }


def test_every_case_has_its_file():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(parity.CASES)


@pytest.mark.parametrize("case", parity.CASES)
def test_logits_loss_and_gradients(case, tmp_path):
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        content = dict(file)
    (tmp_path / "config.json").write_text(str(content["config"]))
    config = hf.read_config(tmp_path)
    inputs = parity.Inputs(**part(content, "inputs."))
    reference = parity.Result(
        content["logits"], content["loss"], part(content, "gradients.")
    )
    result = parity.ours(config, inputs, part(content, "weights."))
    parity.assert_close(result, reference, inputs)
