# SPDX-License-Identifier: Apache-2.0
"""The memory model, against the step's arguments, sums by hand and compiled configs."""

import dataclasses
import re
from pathlib import Path

import pytest

from lm_scale.config import DataConfig, RunConfig, load_config
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, LlamaConfig
from lm_scale.models.layout import LANES
from lm_scale.planning.accelerators import GIB, find_slice
from lm_scale.planning.activations import trace_stacks
from lm_scale.planning.compile_step import lower_step, slice_mesh
from lm_scale.planning.memory_model import LOW, MemoryModel
from lm_scale.planning.time_model import sent_bytes
from lm_scale.sharding import PRESETS, MeshShape

pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP = 3, 64, 4, 2, 16, 96
CONFIG = RunConfig(
    run_dir="runs/tiny",
    model=LlamaConfig(
        vocab=512, positions=32, layers=LAYERS, embed=WIDTH, heads=HEADS,
        kv_heads=KV_HEADS, head_dim=HEAD_DIM, mlp=MLP,
    ),
    data=DataConfig(tokenizer=TokenizerConfig(vocab_size=512)),
    seq_len=32,
    batch=64,
    steps=100,
    slice="v3-8",
    compute=Compute(remat="full", loss_chunk=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def estimate():
    """`estimate(config, rules, mesh)`: by one model, as in a search."""
    model = MemoryModel()

    def estimate(config=CONFIG, rules="dp", mesh=MeshShape(), **compute):  # noqa: B008
        compute = dataclasses.replace(config.compute, rules=PRESETS[rules], **compute)
        config = dataclasses.replace(config, compute=compute, mesh=mesh)
        devices = slice_mesh(config, find_slice(config.slice))
        return model.estimate(config, devices), config, devices

    return estimate


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [("zero1", MeshShape(data=8)), ("fsdp_tp", MeshShape(data=2, fsdp=2, tensor=2))],
)
def test_what_a_step_is_given_is_exact(estimate, rules, mesh):
    found, config, devices = estimate(rules=rules, mesh=mesh)
    _, given = lower_step(config, devices)
    assert (found.weights, found.optimizer, found.batch) == (
        given.weights, given.optimizer, given.batch,
    )  # fmt: skip
    assert found.given == given.total
    assert found.least == found.given + LOW * (found.peak - found.given)


# Numbers that a layer keeps of a token: its input; what the policy adds to it. What the
# mlp makes is a part of the next layer's input, and not kept besides.
PROJECTED = HEADS * HEAD_DIM
# What attention gives, and a number in f32 for each query and head.
ATTENDED = PROJECTED + 2 * HEADS
# Of each norm what it has normalised, and a number in f32; its input not besides.
NORMED = 2 * (WIDTH + 2)
KEPT = {
    "full": WIDTH,
    "attention": WIDTH + ATTENDED,
    "dots": NORMED + PROJECTED + 2 * KV_HEADS * HEAD_DIM + ATTENDED + 2 * MLP,
}


@pytest.mark.parametrize("remat", KEPT)
def test_what_is_kept_is_what_is_counted_by_hand(estimate, remat):
    """bf16; heads and mlp are cut in two by `tensor`, and rows in four."""
    tokens = CONFIG.batch * CONFIG.seq_len // 8
    found, *_ = estimate(remat=remat)
    assert found.kept == 2 * LAYERS * tokens * KEPT[remat]
    mesh = MeshShape(data=4, tensor=2)
    cut, *_ = estimate(remat=remat, rules="fsdp_tp", mesh=mesh)
    width = {"dots": NORMED}.get(remat, WIDTH)  # of the residual stream: whole
    numbers = width + (KEPT[remat] - width) // 2
    assert cut.kept == 2 * LAYERS * 2 * tokens * numbers


def test_queries_keys_and_values_are_kept_once_as_splash_takes_them():
    """Turned, heads first, filled up to a block: nothing of it is made again."""
    mesh = slice_mesh(CONFIG, find_slice("v5e-8"))
    stacks = [one.shape for one in trace_stacks(CONFIG, mesh, "dots")]
    heads = [shape for shape in stacks if len(shape) == 5]
    of = [(LAYERS, CONFIG.batch, h, LANES, HEAD_DIM) for h in (HEADS, KV_HEADS)]
    assert heads == [of[0], of[1], of[1]]


def test_parts_of_a_batch_keep_their_part_and_add_up_gradients(estimate):
    whole, *_ = estimate(remat="dots")
    parts, *_ = estimate(dataclasses.replace(CONFIG, accumulate=4), remat="dots")
    assert parts.kept == whole.kept // 4 and parts.weights == whole.weights
    assert (whole.sums, parts.sums) == (0, whole.weights)
    assert parts.given == whole.given


def test_none_keeps_more_than_dots_and_scores_where_there_is_no_kernel(estimate):
    found, *_ = estimate(remat="none")
    rows = CONFIG.batch // 8
    scores = 2 * LAYERS * rows * HEADS * CONFIG.seq_len**2
    dots, *_ = estimate(remat="dots")
    assert found.kept > dots.kept + scores


@pytest.mark.parametrize("name", ["llama_160m", "llama_1b", "llama3_8b", "llama3_70b"])
def test_it_is_near_what_the_compiler_said_of_shipped_configs(name):
    """Their docstrings tell it: `Memory    52.5 of 95 GiB`."""
    path = CONFIGS / f"{name}.py"
    said = re.search(r"^Memory +([\d.]+) of", path.read_text(), re.MULTILINE)
    config = load_config(str(path), [], prog="test")
    found = MemoryModel().estimate(config, slice_mesh(config, find_slice(config.slice)))
    assert found.peak / GIB == pytest.approx(float(said[1]), rel=0.1)
    assert found.least < float(said[1]) * GIB


def test_weights_that_are_not_resharded_are_kept_whole_and_sent_once(estimate):
    mesh, kept, sent = MeshShape(data=1, fsdp=8), [], []
    for reshard in (True, False):
        found, config, devices = estimate(
            rules="fsdp", mesh=mesh, reshard_after_forward=reshard
        )
        kept.append(found.kept)
        sent.append(sent_bytes(config, devices, found))
    matrices = WIDTH * (2 * PROJECTED + 2 * KV_HEADS * HEAD_DIM + 3 * MLP)
    assert kept[1] - kept[0] == LAYERS * 2 * (matrices + 2 * WIDTH)  # bf16; and norms
    # Gathered twice in bf16, or once; gradients in f32.
    assert sent[1] == pytest.approx(sent[0] * (2 + 4) / (2 + 2 + 4))
