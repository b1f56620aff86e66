# SPDX-License-Identifier: Apache-2.0
"""The attention kernels: the plain path's numbers, and which of them a run takes."""

import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from tiny import causal_run

from lm_scale.errors import InputError
from lm_scale.models import attention as attention_module
from lm_scale.models import build_model, kernels
from lm_scale.models.attention import Mask, attention
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.kernels import choose_attention
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.optim import AdamW, Schedule, make_optimizer, make_schedule
from lm_scale.sharding import MESH_AXES, MeshShape, Rules, init_params, make_mesh
from lm_scale.start import set_up
from lm_scale.step import abstract_state, decay_mask, make_train_step

B, T, H, K, N = 2, 300, 4, 2, 20  # 300 is filled up to 384, three blocks of 128
WHOLE = Rules(kv_heads=(), act_kv_heads=())  # key-value heads are not cut


def some_qkv(heads=K):
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, N), (B, T, heads, N), (B, T, heads, N)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def documents():
    """Segments of odd lengths; the second row ends in padding."""
    return np.stack([
        np.repeat([3, 4, 5], [129, 70, T - 199]),
        np.repeat([1, 7, 0], [40, 240, T - 280]),
    ]).astype(np.int32)  # fmt: skip


def only_real(segments):
    """All see what is near, but the padding."""
    real = (segments != 0).astype(jnp.int32)
    return Mask(window=37, segments=jnp.ones_like(segments), key_segments=real)


MASKS = {
    "all": lambda segments: Mask(),
    "causal": lambda segments: Mask(causal=True),
    "window in documents": lambda segments: Mask(True, 37, segments),
    "window both ways, padding": only_real,
}


@partial(jax.jit, static_argnames=("kernel", "rules"))
def with_gradients(q, k, v, mask, kernel, rules):
    def total(q, k, v):
        mixed = attention(q, k, v, mask=mask, rules=rules, kernel=kernel)
        return jnp.sum(jnp.sin(mixed)), mixed  # no gradient is all the same

    gradients, mixed = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return mixed, *gradients


@pytest.mark.parametrize("kind", MASKS)
def test_splash_is_the_plain_path(kind, monkeypatch):
    """Forward and backward, rows and heads cut in two, on the CPU by interpretation.

    f32 sums in another order: 1e-5 of values around 1. Every query sees some key.
    """
    interpreted = partial(kernels.splash, interpret=True)
    monkeypatch.setattr(attention_module, "splash", interpreted)
    rules = WHOLE if kind == "causal" else Rules()
    mesh = make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        q, k, v = some_qkv()
        q = jax.device_put(q, rules.spec("batch", "seq", "act_heads", None))
        k, v = jax.device_put((k, v), rules.spec("batch", "seq", "act_kv_heads", None))
        mask = MASKS[kind](jax.device_put(documents(), rules.spec("batch", "seq")))
        plain = with_gradients(q, k, v, mask, "xla", rules)
        ours = with_gradients(q, k, v, mask, "splash", rules)
    for x, expected in zip(ours, plain, strict=True):
        assert jax.typeof(x) == jax.typeof(expected)
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


# --- Which kernel ---------------------------------------------------------------------

LLAMA = LlamaConfig()


@dataclass(frozen=True)
class Device:
    """As much of a device as the choice looks at."""

    platform: str
    device_kind: str
    compute_capability: str | None = None


def tpu(kind):
    return Device("tpu", f"TPU {kind}")


CPU = Device("cpu", "cpu")
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
H200 = Device("gpu", "NVIDIA H200", "9.0")
T4 = Device("gpu", "Tesla T4", "7.5")
MI300 = Device("gpu", "AMD Instinct MI300X", "gfx942")


def choice(
    device, compute=None, model=LLAMA, *, segments=False, context=1, length=48,
    ragged=False,
):  # fmt: skip
    """As on a mesh of such devices, of which there need be none."""
    shape = (1, 1, 1, context, 1)
    mesh = Mesh(np.full(shape, device, object), MESH_AXES)
    causal = not isinstance(model, RobertaConfig)
    return choose_attention(
        compute or Compute(), model, mesh, length=length, causal=causal,
        segments=segments, ragged=ragged,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "kernel", "sentence"),
    [
        (CPU, "xla", "xla (cpu)"),
        (tpu("v2"), "vmem", "vmem (TPU v2)"),
        (tpu("v3"), "vmem", "vmem (TPU v3)"),
        (tpu("v4"), "splash", "splash (TPU v4)"),
        (tpu("v5 lite"), "splash", "splash (TPU v5 lite)"),
        (tpu("v6 lite"), "splash", "splash (TPU v6 lite)"),
        (Device("tpu", "TPU7x"), "splash", "splash (TPU7x)"),
        (A100, "cudnn", "cudnn (NVIDIA A100-SXM4-80GB)"),
        (T4, "xla", "xla (Tesla T4), because cudnn needs a GPU of NVIDIA's compute"),
        (MI300, "xla", "xla (AMD Instinct MI300X), because cudnn needs a GPU of NVID"),
    ],
)
def test_the_devices_decide(device, kernel, sentence):
    chosen, said = choice(device, length=256)
    assert chosen == kernel
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    ("device", "changes", "said"),
    [
        (tpu("v4"), {"model": GPT2Config(), "length": 200}, "and these have 200"),
        (tpu("v3"), {"length": 256, "ragged": True}, "data.pad_to_seq_len = True"),
        (
            tpu("v3"),
            {"length": 2048},
            "... 1024 tokens in bfloat16, and these have",
        ),
        (
            tpu("v3"),
            {"compute": Compute("float32"), "length": 640},
            "256 ... 512 tokens in float32, and these have 640",
        ),
        (
            tpu("v3"),
            {"model": LlamaConfig(head_dim=32), "length": 128},
            "a head_dim of 64 or 128, and it is 32",
        ),
        (
            tpu("v3"),
            {"model": GPT2Config(embed=192, heads=3), "length": 128},
            "pairs of heads, and a device has 3",
        ),
        (
            tpu("v3"),
            {"model": LlamaConfig(kind="mistral", window=9), "length": 128},
            "no sliding window (model.window = 9)",
        ),
        (A100, {"model": RobertaConfig()}, "attention_dropout = 0.1"),
        (A100, {"compute": Compute("float32")}, "compute.dtype = float32"),
        (A100, {"model": LlamaConfig(head_dim=132)}, "it is 132"),
        (H200, {"model": LlamaConfig(head_dim=132)}, "it is 132"),
        (A100, {"model": LlamaConfig(head_dim=160)}, "8, 16 ... 128, and it is 160"),
        (A100, {"segments": True}, "the documents or the padding of a row apart"),
    ],
)
def test_what_a_kernel_cannot_do_xla_does(device, changes, said):
    kernel, sentence = choice(device, **changes)
    assert kernel == "xla"
    assert f"xla ({device.device_kind}), because " in sentence
    assert said in sentence
    # Asked for by name, it is a mistake that is said before any work.
    name = "vmem" if device.platform == "tpu" else "cudnn"
    forced = replace(changes.get("compute", Compute()), attention=name)
    with pytest.raises(InputError, match=re.escape(said)):
        choice(device, **changes | {"compute": forced})


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        (tpu("v4"), {"compute": Compute("float32"), "segments": True}),
        (tpu("v4"), {"model": LlamaConfig(head_dim=30)}),
        (H200, {"model": LlamaConfig(head_dim=160)}),
        (A100, {"model": GPT2Config(attention_dropout=0.0)}),
        (tpu("v5 lite"), {"model": RobertaConfig(), "segments": True, "length": 512}),
        (tpu("v3"), {"compute": Compute("float32"), "length": 512}),
        (tpu("v2"), {"model": GPT2Config(), "length": 1024}),
    ],
)
def test_what_a_kernel_can_do(device, changes):
    assert choice(device, **changes)[0] != "xla"


@pytest.mark.parametrize(
    ("device", "name", "said"),
    [
        (CPU, "splash", "splash is for TPUs, and the devices are cpu"),
        (A100, "splash", "splash is for TPUs, and the devices are NVIDIA A100"),
        (tpu("v3"), "splash", "splash needs a TPU v4 or later"),
        (tpu("v4"), "splash", "splash does not drop out attention weights"),
        (H200, "vmem", "vmem is for TPUs, and the devices are NVIDIA H200"),
        (CPU, "cudnn", "cudnn is for NVIDIA's GPUs, and the devices are cpu"),
        (tpu("v4"), "cudnn", "cudnn is for NVIDIA's GPUs"),
        (CPU, "ring", "ring is for sequences that the mesh cuts"),
    ],
)
def test_forcing_a_kernel_onto_the_wrong_devices_is_an_error(device, name, said):
    model = RobertaConfig() if "drop out" in said else LLAMA
    with pytest.raises(InputError, match=f"compute.attention = '{name}'.*{said}"):
        choice(device, Compute(attention=name), model)


def test_a_newer_tpu_says_that_dropout_keeps_it_from_splash():
    kernel, sentence = choice(tpu("v6 lite"), model=RobertaConfig(), length=2048)
    assert kernel == "xla"
    assert "1024 tokens in bfloat16, and these have 2048; and splash" in sentence
    assert "(model.attention_dropout = 0.1)" in sentence


@pytest.mark.parametrize("device", [CPU, tpu("v3"), tpu("v4"), H200])
def test_sequences_that_are_cut_take_the_ring(device):
    kind = device.device_kind
    for model in (LLAMA, RobertaConfig(attention_dropout=0.0)):
        assert choice(device, model=model, context=4) == ("ring", f"ring ({kind})")
    for changes, said in (
        ({"length": 44}, "in 2 × 4 equal chunks, and its 44 positions"),
        ({"model": RobertaConfig()}, "attention_dropout = 0.1"),
    ):
        kernel, sentence = choice(device, context=4, **changes)
        assert kernel == "xla" and said in sentence
        with pytest.raises(InputError, match=re.escape(said)):
            choice(device, Compute(attention="ring"), context=4, **changes)
    for name, on in (("splash", tpu("v4")), ("cudnn", H200)):
        with pytest.raises(InputError, match="the mesh cuts them into 4"):
            choice(on, Compute(attention=name), context=4)


@pytest.mark.parametrize("device", [CPU, tpu("v4"), A100])
def test_xla_can_be_forced(device):
    kernel, sentence = choice(device, Compute(attention="xla"))
    assert (kernel, sentence) == ("xla", f"xla ({device.device_kind})")


def test_a_run_says_no_before_any_work(tmp_path):
    config = causal_run(tmp_path, compute=Compute(attention="splash"))
    with pytest.raises(InputError, match="compute.attention = 'splash' does not work"):
        set_up(config)
    assert not (tmp_path / "run").exists()


# --- In the models --------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [GPT2Config, LlamaConfig, RobertaConfig], ids=["gpt2", "llama", "roberta"]
)
def test_a_model_uses_the_kernel_where_it_can(config, monkeypatch):
    """Not with dropout of attention weights, nor of tokens in another order."""
    seen = []

    def splash(q, k, v, **options):
        seen.append(options)
        return q

    monkeypatch.setattr(attention_module, "splash", splash)
    shape = {"vocab": 17, "positions": 9, "layers": 1, "embed": 8, "heads": 2, "mlp": 8}
    if config is LlamaConfig:
        shape |= {"kind": "mistral", "kv_heads": 1, "head_dim": 4, "window": 3}
    model = build_model(
        config(**shape, attention_dropout=0.1), Compute(attention="splash")
    )

    def run(**options):
        """Traces the model; what its layer asked of the kernel."""
        seen.clear()
        jax.eval_shape(
            lambda: nnx.merge(
                nnx.split(model)[0], init_params(model, Rules(), jax.random.key(0))
            )(jnp.zeros((1, 9), jnp.int32), **options)
        )
        return seen

    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        (call,) = run(segments=jnp.ones((1, 9), jnp.int32))
        assert call["causal"] == (config is not RobertaConfig)
        assert call["window"] == shape.get("window")
        assert call["segments"] is not None
        assert run(key=jax.random.key(0)) == []
        if config is not RobertaConfig:
            assert run(positions=jnp.arange(9)[None]) == []


# --- cuDNN ----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What reaches jax.nn's attention; it is computed by the plain means there."""
    seen, real = [], jax.nn.dot_product_attention

    def spy(q, k, v, *, implementation, **options):
        seen.append({"implementation": implementation, **options, "q": q.shape,
                     "k": k.shape, "dtype": q.dtype})  # fmt: skip
        return real(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    return seen


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (Mask(), None),
        (Mask(causal=True), None),
        (Mask(causal=True, window=5), (4, 0)),
    ],
    ids=["all", "causal", "window"],
)
def test_cudnn_gets_each_device_its_part(mask, window, calls):
    """Its numbers cannot be had here: the same call, computed by XLA, has the plain's.

    f32, as the arguments of the two are; 1e-5 for the order of sums.
    """
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 9, 4, 6), np.float32)
    k, v = rng.standard_normal((2, 2, 9, 2, 6), np.float32)
    rules = Rules()
    with jax.set_mesh(make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])):
        q, k, v = jax.device_put(
            (q, k, v), rules.spec("batch", "seq", "act_heads", None)
        )
        plain = jax.jit(partial(attention, mask=mask, rules=rules))(q, k, v)
        ours = jax.jit(partial(attention, mask=mask, rules=rules, kernel="cudnn"))(
            q, k, v
        )
    (call,) = calls
    assert call == {
        "implementation": "cudnn", "is_causal": mask.causal,
        "local_window_size": window, "q": (1, 9, 2, 6), "k": (1, 9, 1, 6),
        "dtype": np.float32,
    }  # fmt: skip
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_cudnn_in_the_program_for_a_gpu(monkeypatch):
    """Lowered for CUDA: cuDNN's calls, forward and backward, with the mask in words."""
    # The version of a library that is not here; 9.10 has all that is used.
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    mesh, rules = make_mesh(MeshShape(data=4, tensor=2)), Rules()

    def total(q, k, v):
        mask = Mask(causal=True, window=5)
        mixed = attention(q, k, v, mask=mask, rules=rules, kernel="cudnn")
        return jnp.sum(mixed.astype(jnp.float32))

    heads = NamedSharding(mesh, rules.spec("batch", "seq", "act_heads", None))
    q, k, v = (
        jax.ShapeDtypeStruct((4, 40, heads_of, 24), jnp.bfloat16, sharding=heads)
        for heads_of in (4, 2, 2)
    )
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"custom_call @(__cudnn\S*?)\(", text)
    assert names == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == ["5", "5"]
    assert re.findall(r"mask_type\\22: \\22(\w+)\\22", text) == ["CAUSAL", "CAUSAL"]


# --- For TPUs, of which there need be none --------------------------------------------


def lowered_step(topology, monkeypatch, length=200, head_dim=32, **settings):
    """The bf16 train step of a tiny Llama for a slice of TPUs, and its kernel."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is missing")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    parts = MeshShape(data=-1, tensor=2)
    mesh = make_mesh(parts, described.devices)
    config = LlamaConfig(
        vocab=256, positions=length, layers=2, embed=128, heads=4, kv_heads=2,
        head_dim=head_dim, mlp=256,
    )  # fmt: skip
    kernel, _ = choose_attention(
        Compute(), config, mesh, length=length, causal=True, segments=False
    )
    model = build_model(config, Compute(attention=kernel, **settings))
    schedule = make_schedule(Schedule(), 100)
    optimizer = make_optimizer(AdamW(), schedule, decay_mask(model))
    step = make_train_step(model, optimizer, schedule, seed=0)
    rows = NamedSharding(mesh, Rules().spec("batch", "seq"))
    tokens = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=rows)
    state = abstract_state(model, optimizer, mesh)
    with jax.set_mesh(mesh):
        return step.lower(state, {"tokens": tokens, "labels": tokens}), kernel


def test_the_step_for_a_new_tpu_has_the_mosaic_kernel(monkeypatch):
    lowered, kernel = lowered_step("v5e:2x2", monkeypatch)
    assert kernel == "splash"
    assert "tpu_custom_call" in lowered.as_text()


def test_the_step_for_an_old_tpu_has_our_own_for_rows_that_it_takes(monkeypatch):
    lowered, kernel = lowered_step("v3:2x2", monkeypatch)
    assert kernel == "xla"
    assert "tpu_custom_call" not in lowered.as_text()
    lowered, kernel = lowered_step("v3:2x2", monkeypatch, length=256, head_dim=64)
    assert kernel == "vmem"
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("remat", ["dots", "attention"])
def test_what_is_kept_for_the_backward_pass_can_go_to_the_host(remat, monkeypatch):
    """Both ways: to the host in the forward pass, and back in the other."""
    placed = [
        len(re.findall(f'placement = "{place}"|"{place}"', lowered.as_text()))
        for lowered, _ in (
            lowered_step("v5e:2x2", monkeypatch, remat=remat, offload=True),
            lowered_step("v5e:2x2", monkeypatch, remat=remat),
        )
        for place in ("pinned_host", "device")
    ]
    assert min(placed[:2]) > 0 and placed[2] == 0


FURTHER = pytest.param("v5e:2x2", marks=pytest.mark.exhaustive)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent")  # not for other devices
@pytest.mark.parametrize("topology", ["v3:2x2", FURTHER, "v6e:2x2"])
def test_the_step_of_a_tpu_compiles(topology, monkeypatch):
    """Splash: one Mosaic call forward, one for dq, one for dk and dv; vmem: two."""
    lowered, kernel = lowered_step(topology, monkeypatch, length=384, head_dim=64)
    text = lowered.compile().as_text()
    calls = text.count('custom_call_target="tpu_custom_call"')
    assert calls >= 3 if kernel == "splash" else calls == 2
