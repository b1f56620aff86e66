# SPDX-License-Identifier: Apache-2.0
"""The same ten steps on every mesh: what tests/matrix.py trains, compared."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import matrix
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

# Sums over devices are made in another order, and Adam divides a gradient by its own
# size, so that a small one brings its rounding along.
LOSS, WEIGHTS = 1e-5, 1e-4
# bf16 has 8 bits of mantissa: 1/256 for one rounding, and the loss is a mean of many.
LOSS_BF16, WEIGHTS_BF16 = 2e-3, 2e-2
LOSS_8_BITS = 2e-4
# The one with the most in it; the others later.
ONE_OF_THEM = [
    pytest.param(family, marks=[pytest.mark.exhaustive] * (family != "llama"))
    for family in matrix.FAMILIES
]


def assert_same(found, expected, loss=LOSS, weights=WEIGHTS):
    np.testing.assert_allclose(found[0], expected[0], rtol=loss)
    assert found[1].keys() == expected[1].keys()
    for path, value in expected[1].items():
        other = found[1][path]
        if path == "blocks.qkv_bias":
            # Softmax does not see what is added to all keys: the key bias has gradient
            # 0, and Adam makes steps of full size out of its rounding noise.
            value, other = np.delete(value, 1, axis=1), np.delete(other, 1, axis=1)
        np.testing.assert_allclose(other, value, rtol=0, atol=weights, err_msg=path)


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_one_device_learns(family):
    losses, _ = matrix.train(family, matrix.ONE)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("accumulate", "unroll"), (*matrix.VARIANTS[1:], *matrix.MIXED)
)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_accumulated_and_unrolled_on_one_device(family, accumulate, unroll):
    found = matrix.train(family, matrix.ONE, accumulate, unroll)
    assert_same(found, matrix.train(family, matrix.ONE))


@pytest.mark.parametrize("unroll", [2, 4])
def test_layers_two_by_two(monkeypatch, unroll):
    """With dropout, of which each layer has a key."""
    rates = dict.fromkeys(matrix.RATES, 0.3)
    deep = dataclasses.replace(matrix.FAMILIES["gpt2"], layers=4, **rates)
    monkeypatch.setitem(matrix.FAMILIES, "deep", deep)
    layout = matrix.LAYOUTS["data=2 fsdp=2 tensor=2"]
    found = matrix.train("deep", layout, unroll=unroll, steps=3)
    assert_same(found, matrix.train("deep", matrix.ONE, steps=3))


def every_mesh() -> list:
    """Two of three families on each mesh, a variant each by turns; the rest later."""
    cases = itertools.product(*map(enumerate, [matrix.FAMILIES, matrix.LAYOUTS]))
    later = [pytest.mark.exhaustive]
    return [
        pytest.param(family, layout, *variant, marks=later * ((i + j + k) % 3 > 0))
        for (i, family), (j, layout) in cases
        for k, variant in enumerate(matrix.VARIANTS)
    ]


@pytest.mark.slow  # all together
@pytest.mark.parametrize(("family", "layout", "accumulate", "unroll"), every_mesh())
def test_every_mesh_trains_as_one_device(family, layout, accumulate, unroll):
    found = matrix.train(family, matrix.LAYOUTS[layout], accumulate, unroll)
    assert_same(found, matrix.train(family, matrix.ONE))


@pytest.mark.parametrize(("accumulate", "unroll"), matrix.MIXED)
@pytest.mark.parametrize("family", ONE_OF_THEM)
def test_accumulated_or_unrolled_alone(family, accumulate, unroll):
    layout = matrix.LAYOUTS["data=2 fsdp=2 tensor=2"]
    found = matrix.train(family, layout, accumulate, unroll)
    assert_same(found, matrix.train(family, matrix.ONE))


@pytest.mark.parametrize("layout", matrix.MORE_LAYOUTS)
@pytest.mark.parametrize("family", ONE_OF_THEM)
def test_every_preset_trains_as_one_device(family, layout):
    found = matrix.train(family, matrix.MORE_LAYOUTS[layout], accumulate=4)
    assert_same(found, matrix.train(family, matrix.ONE))


@pytest.mark.parametrize(
    "layout",
    [
        "data=2 fsdp=2 tensor=2",
        pytest.param("context=8", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_bfloat16_on_a_mesh(family, layout):
    expected = matrix.train(family, matrix.ONE, dtype="bfloat16")
    found = matrix.train(family, matrix.LAYOUTS[layout], dtype="bfloat16")
    assert_same(found, expected, LOSS_BF16, WEIGHTS_BF16)


@pytest.mark.parametrize("quantize", ["int8", "float8"])
@pytest.mark.parametrize("family", ONE_OF_THEM)
def test_in_8_bits_on_a_mesh(family, quantize):
    """Two steps only: a value that lies halfway between two of 8 bits is rounded up on
    one mesh and down on the other, and what follows differs by more each step."""
    layout = matrix.LAYOUTS["data=2 fsdp=2 tensor=2"]
    plain, _ = matrix.train(family, matrix.ONE, steps=2)
    expected, _ = matrix.train(family, matrix.ONE, steps=2, quantize=quantize)
    found, _ = matrix.train(family, layout, steps=2, quantize=quantize)
    np.testing.assert_allclose(found, expected, rtol=LOSS_8_BITS)
    np.testing.assert_allclose(found, plain, rtol=20 * LOSS_8_BITS)
    assert np.abs(found / plain - 1).max() > LOSS  # there was something to round


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The results of two processes of four devices, one file a variant."""
    folder = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/local.py"), "-n", "2", "--devices", "4",
         "--", sys.executable, str(ROOT / "tests/matrix.py"), str(folder)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_device(two_processes):
    for family, (accumulate, unroll) in matrix.BY_TURNS:
        with np.load(two_processes / f"{family}-{accumulate}-{unroll}.npz") as kept:
            weights = dict(kept)
        found = weights.pop("losses"), weights
        assert_same(found, matrix.train(family, matrix.ONE))
