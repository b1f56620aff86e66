# SPDX-License-Identifier: Apache-2.0
"""Run configs: as JSON and back, from files, overridden, checked, and kept."""

import dataclasses
import json

import jax
import pytest

from lm_scale.config import DataConfig, RunConfig, load_config
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.errors import InputError
from lm_scale.guard import Guard
from lm_scale.models import Compute, GPT2Config, RobertaConfig
from lm_scale.objectives import CausalLM, MaskedLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.run_json import (
    FREE,
    check_run_dir,
    field_names,
    from_dict,
    read_run,
    to_dict,
    write_config,
)
from lm_scale.sharding import PRESETS, MeshShape, Rules, make_mesh

GPT2 = RunConfig(run_dir="runs/gpt2", steps=10)
ROBERTA = RunConfig(  # no field that has its default, as far as it can be
    run_dir="runs/roberta",
    model=RobertaConfig(vocab=300, layers=2, embed=32, heads=4, mlp=48, dropout=0.0),
    objective=MaskedLM(probability=0.2, masked=0.7, random=0.2),
    data=DataConfig(
        corpus=CorpusConfig(source="text/*.txt", sample_by="paragraph"),
        tokenizer=TokenizerConfig(path="roberta-base", kind="roberta"),
        separator=False,
        store="data/roberta",
    ),
    optimizer=AdamW(beta2=0.98, weight_decay=0.01, clip=1.0),
    schedule=Schedule(peak=1e-3, warmup=5, decay="cosine", final=0.1),
    guard=Guard(patience=3, spike=None, window=9, rollbacks=1),
    seq_len=96,
    batch=32,
    accumulate=2,
    epochs=1.5,
    seed=7,
    init_from="models/roberta",
    mesh=MeshShape(data=2, fsdp=-1, tensor=2),
    compute=Compute(
        dtype="float32", remat="full", loss_chunk=7,
        rules=Rules(embed=(), batch=("fsdp",), seq=("data",), vocab=("fsdp", "tensor")),
    ),
    simulated_devices=8,
    log_every=3,
    eval_every=5,
    save_every=None,
    keep=9,
    stop_at=4,
    sample_prompt="ein Text, über etwas",
)  # fmt: skip


def changed(config, **changes):
    """`changed(config, optimizer__beta1=0.8)`: replaces a nested field."""
    for name, value in changes.items():
        head, _, rest = name.partition("__")
        if rest:
            value = changed(getattr(config, head), **{rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config


# --- JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2, ROBERTA], ids=["gpt2", "roberta"])
def test_to_json_and_back(config):
    text = json.dumps(to_dict(config))
    again = from_dict(RunConfig, json.loads(text))
    assert again == config
    assert hash(again) == hash(config)  # tuples are tuples: configs are static in jit


def test_json_says_which_kind_a_union_holds():
    assert to_dict(ROBERTA)["model"]["type"] == "RobertaConfig"
    assert to_dict(GPT2)["objective"] == {"type": "CausalLM"}


# --- Files ----------------------------------------------------------------------------

FILE = """\
from lm_scale.config import RunConfig
from lm_scale.models import GPT2Config

config = RunConfig(run_dir="runs/a", model=GPT2Config(layers=2), steps=10)
"""


@pytest.fixture
def load(tmp_path):
    """load(text of the file, *overrides)."""

    def load_text(text, *overrides):
        path = tmp_path / "config.py"
        path.write_text(text)
        return load_config(str(path), list(overrides), prog="lm-scale train")

    return load_text


def test_a_file_is_its_config(load):
    expected = RunConfig(run_dir="runs/a", model=GPT2Config(layers=2), steps=10)
    assert load(FILE) == expected


def test_a_config_may_import_its_neighbour(load, tmp_path):
    (tmp_path / "parent_of_a_config.py").write_text(FILE)
    child = "from parent_of_a_config import config as parent\n"
    child += "import dataclasses\nconfig = dataclasses.replace(parent, seed=5)\n"
    assert load(child).seed == 5


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(InputError, match=f"no config file '{path}'"):
            load_config(str(path), [], prog="lm-scale train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n\nconfig = (\n", "SyntaxError: .*line 3"),
        ("x = 1\n\nraise OSError('no such disk')\n", "line 3, .*OSError: no such disk"),
        ("import no_such_module_here\n", "line 1, .*no_such_module_here"),
        (FILE.replace("steps", "stepz"), "line 4, .*TypeError.*stepz"),
        (FILE.replace("layers=2", "heads=5"), "model.embed = 768 .* model.heads = 5"),
        (FILE.replace("config =", "settings ="), "no variable `config`"),
        ("config = {'run_dir': 'x'}\n", "no variable `config` that is a RunConfig"),
        ("", "no variable `config`"),
    ],
)
def test_a_file_that_is_wrong(load, tmp_path, text, said):
    with pytest.raises(InputError, match=said) as error:
        load(text)
    if "model.embed" not in said:  # an InputError of a part is complete by itself
        assert str(tmp_path / "config.py") in str(error.value)


# --- Overrides ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["--seed", "7"], {"seed": 7}),
        (["--model.layers", "3"], {"model__layers": 3}),
        (["--optimizer.weight-decay", "0.1"], {"optimizer__weight_decay": 0.1}),
        (["--optimizer.weight_decay", "0.1"], {"optimizer__weight_decay": 0.1}),
        (["--optimizer.clip", "1"], {"optimizer__clip": 1.0}),
        (["--guard.policy", "rollback"], {"guard__policy": "rollback"}),
        (["--guard.spike", "None"], {"guard__spike": None}),
        (["--schedule.decay", "cosine"], {"schedule__decay": "cosine"}),
        (["--data.corpus.source", "a.txt"], {"data__corpus__source": "a.txt"}),
        (["--mesh.fsdp", "4", "--mesh.data", "2"], {"mesh": MeshShape(2, 4)}),
        (["--steps", "None", "--epochs", "0.5"], {"steps": None, "epochs": 0.5}),
        (
            ["--compute.rules.embed", "fsdp", "expert"],
            {"compute__rules__embed": ("fsdp", "expert")},
        ),
    ],
)
def test_overrides_reach_nested_fields(load, overrides, changes):
    assert load(FILE, *overrides) == changed(load(FILE), **changes)


def test_overrides_of_the_fields_of_the_other_kinds(load):
    text = FILE.replace("GPT2Config(layers=2)", "RobertaConfig(), objective=MaskedLM()")
    text = text.replace("GPT2Config", "RobertaConfig")
    text = "from lm_scale.objectives import MaskedLM\n" + text
    config = load(text, "--objective.probability", "0.3", "--model.pad-id", "0")
    assert config.objective == MaskedLM(probability=0.3)
    assert config.model == RobertaConfig(pad_id=0)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("--optimiser.beta1", "--optimizer.beta1"),
        ("--model.layer", "--model.layers"),
        ("--sede", "--seed"),
    ],
)
def test_an_unknown_override_names_a_near_one(load, capsys, override, meant):
    with pytest.raises(SystemExit) as exit_:
        load(FILE, override, "3")
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert override in shown and f"{meant} " in shown


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--steps", "many"], "many"),
        (["--compute.dtype", "float16"], "bfloat16"),
        (["--model.heads", "5"], "model.heads"),
        (["--model.heads", "0"], "model.heads"),
        (["--compute.rules.embed", "fsdq"], "fsdq"),
        (["--objective.probability", "0.2"], "--objective.probability"),  # is causal
    ],
)
def test_a_wrong_value_exits_with_2(load, capsys, overrides, said):
    with pytest.raises(SystemExit) as exit_:
        load(FILE, *overrides)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


RULES = "from lm_scale.sharding import Rules\nrules = Rules(embed=('data',))\n"


def test_rules_by_name_or_from_a_file(load, tmp_path):
    for arguments in (["--rules", "zero1"], ["--rules=zero1"]):
        assert load(FILE, *arguments).compute.rules == PRESETS["zero1"]
    # A single rule may follow, and whatever else the file says of `compute` stays.
    text = FILE.replace("steps", "compute=Compute(remat='full'), steps")
    text = "from lm_scale.models import Compute\n" + text
    config = load(text, "--rules", "dp", "--compute.rules.vocab", "tensor")
    rules = dataclasses.replace(PRESETS["dp"], vocab=("tensor",))
    assert config == changed(load(text), compute__rules=rules)
    (tmp_path / "rules.py").write_text(RULES)
    config = load(FILE, "--rules", str(tmp_path / "rules.py"))
    assert config.compute.rules == Rules(embed=("data",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "expected one of dp, zero1, .*, or a Python file"),
        ("rules = {'embed': 'data'}", "no variable `rules` that is a Rules"),
        (RULES.replace("'data'", "'date'"), "names the mesh axis 'date'"),
        (
            RULES.replace("('data',)", "'data'"),
            "Rule `embed` = 'data': expected a tuple",
        ),
        (RULES.replace("embed", "embedding"), "rules.py, line 2, .*embedding"),
    ],
)
def test_rules_that_are_wrong(load, tmp_path, text, said):
    path = tmp_path / "rules.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        load(FILE, "--rules", str(path))
    with pytest.raises(InputError, match="rules '': expected one of"):
        load(FILE, "--rules")


# --- check() --------------------------------------------------------------------------


def check(config, devices):
    """All that is checked before any text is read."""
    config.check()
    config.check_mesh(make_mesh(config.mesh, jax.devices()[:devices]))


SMALL = changed(GPT2, batch=32, seq_len=24, model__positions=24, schedule__warmup=2)


def test_good_configs_pass():
    check(SMALL, 8)
    check(SMALL, 1)
    check(ROBERTA, 8)
    check(changed(SMALL, steps=None, epochs=0.1), 8)
    check(changed(SMALL, accumulate=4), 8)
    check(changed(SMALL, mesh=MeshShape(data=2, context=4)), 8)
    check(changed(SMALL, save_every=None, eval_every=None, stop_at=None), 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 30}, "batch = 30 .* 8 part.* a multiple of 8"),
        ({"batch": 40, "accumulate": 2}, "batch = 40 .* accumulate into 2.* of 16"),
        ({"mesh": MeshShape(2, 2, tensor=2), "batch": 6}, "4 part.*data×fsdp.* of 4"),
        (
            {"mesh": MeshShape(1, context=8), "seq_len": 20},
            "seq_len = 20 .* 8 part.*context.* of 8",
        ),
        (
            {
                "mesh": MeshShape(1, tensor=8),
                "seq_len": 20,
                "compute": Compute(rules=PRESETS["fsdp_tp_sp"]),
            },
            "seq_len = 20 .* 8 part.*tensor.* of 8",
        ),
        ({"mesh": MeshShape(data=3)}, "data=3.* 8 device"),
        (
            {
                "mesh": MeshShape(data=4, tensor=2),
                "compute": Compute(rules=PRESETS["dp"]),
            },
            "tensor = 2.*`tensor`.*lm-scale rules",
        ),
        ({"mesh": MeshShape(data=4, expert=2)}, "expert = 2.*`expert`"),
        (
            {"guard": Guard(policy="rollback"), "save_every": None},
            "guard.policy = 'rollback' .* save_every = None",
        ),
        ({"seq_len": 25}, "seq_len = 25 .*model.positions = 24"),
        ({"compute__unroll": 5}, "compute.unroll = 5 must .*layers .model.layers = 12"),
        ({"steps": None}, "give `steps` or `epochs`"),
        ({"epochs": 1.0}, "`steps` = 10 and `epochs` = 1.0: give one"),
        ({"objective": MaskedLM()}, "GPT2Config needs the objective CausalLM"),
        ({"model": RobertaConfig()}, "RobertaConfig needs the objective MaskedLM"),
        ({"model": RobertaConfig(), "objective": CausalLM()}, "needs .* MaskedLM"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        check(changed(SMALL, **changes), 8)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "seq_len", "batch", "accumulate", "steps", "log_every", "eval_every",
        "save_every", "keep", "stop_at", "compute__loss_chunk",
    ],
)  # fmt: skip
def test_counts_must_be_above_0(name, value):
    said = f"{name.replace('__', '.')} = {value}: .*above 0"
    with pytest.raises(InputError, match=said):
        check(changed(SMALL, **{name: value}), 8)


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_epochs_must_be_above_0(value):
    with pytest.raises(InputError, match=f"epochs = {value}: .*above 0"):
        check(changed(SMALL, steps=None, epochs=value), 8)


def test_the_seed_may_be_0_but_not_negative():
    """numpy's generators, which order and mask the data, take no negative seed."""
    check(changed(SMALL, seed=0), 8)
    with pytest.raises(InputError, match="seed = -1"):
        check(changed(SMALL, seed=-1), 8)


def test_steps_of_a_run():
    assert SMALL.total_steps(1000) == 10
    by_epochs = changed(SMALL, steps=None, epochs=1.5)
    assert by_epochs.total_steps(64) == 3  # 96 sequences in batches of 32
    assert by_epochs.total_steps(65) == 4


def test_store_dir():
    assert GPT2.store_dir == "runs/gpt2/data"
    assert ROBERTA.store_dir == "data/roberta"


# --- The run directory ----------------------------------------------------------------


def in_dir(config, path):
    return dataclasses.replace(config, run_dir=str(path))


def begun(config, path):
    """The config of a run in `path` that has saved its step 10."""
    config = in_dir(config, path)
    write_config(config)
    (path / "checkpoints" / "10").mkdir(parents=True)
    return config


def test_written_and_read_again(tmp_path):
    config = in_dir(ROBERTA, tmp_path / "new" / "run")
    check_run_dir(config)  # nothing there yet
    write_config(config)
    assert read_run(config.run_dir) == config
    files = [path.name for path in (tmp_path / "new" / "run").iterdir()]
    assert files == ["run.json"]


def test_the_same_run_goes_on_also_where_it_was_moved_to(tmp_path):
    check_run_dir(begun(ROBERTA, tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "moved")
    moved = in_dir(ROBERTA, tmp_path / "moved")
    assert read_run(tmp_path / "moved") == moved
    check_run_dir(moved)


def test_a_different_config_is_refused_field_by_field(tmp_path):
    config = begun(GPT2, tmp_path)
    other = changed(config, seed=1, model__layers=3, optimizer__clip=1.0, keep=9)
    with pytest.raises(InputError) as error:
        check_run_dir(other)
    lines = str(error.value).splitlines()[1:-1]
    assert [line.strip() for line in lines] == [
        "model.layers: 12 there, 3 here (its weights have other shapes: no override "
        "helps)",
        "optimizer.clip: None there, 1.0 here",
        "seed: 42 there, 1 here",
    ]
    assert read_run(tmp_path) == config  # and nothing was overwritten


def test_a_run_that_saved_nothing_may_start_over_with_another_config(tmp_path):
    write_config(in_dir(GPT2, tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-0").mkdir()  # a broken write
    other = in_dir(ROBERTA, tmp_path)
    check_run_dir(other)
    write_config(other)
    assert read_run(tmp_path) == other


def test_free_fields_may_differ(tmp_path):
    config = begun(GPT2, tmp_path)
    other = changed(
        config, mesh=MeshShape(data=2, fsdp=4), simulated_devices=8,
        compute__remat="full", compute__loss_chunk=7, compute__rules=Rules(embed=()),
        log_every=3, eval_every=5, save_every=7, keep=9, stop_at=4,
        sample_prompt="Once", data__store="elsewhere",
    )  # fmt: skip
    check_run_dir(other)


def test_free_names_are_fields():
    assert set(FREE) <= field_names(RunConfig)


def test_another_kind_of_model_is_told_by_its_fields(tmp_path):
    config = begun(GPT2, tmp_path)
    masked = changed(config, model=RobertaConfig(), objective=MaskedLM())
    with pytest.raises(InputError) as error:
        check_run_dir(masked)
    said = str(error.value)
    assert "model.type: 'GPT2Config' there, 'RobertaConfig' here" in said
    assert "objective.probability: None there, 0.15 here" in said
    assert "model.layers" not in said  # the same in both


def test_a_config_of_an_older_version_gets_the_defaults_of_new_fields(tmp_path):
    config = in_dir(GPT2, tmp_path)
    stored = to_dict(config)
    del stored["keep"], stored["model"]["init_std"]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert read_run(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__heads": 0}, "model.heads = 0"),
        ({"model__layers": 0}, "model.layers = 0"),
        ({"model__residual_dropout": 1.0}, "residual_dropout = 1.0"),
        ({"optimizer__clip": 0.0}, "clip > 0"),
        ({"optimizer__beta2": 1.0}, "0 <= beta < 1"),
    ],
)
def test_parts_refuse_what_describes_nothing(changes, said):
    with pytest.raises(InputError, match=said):
        changed(GPT2, **changes)


def test_a_tokenizer_that_cannot_fit_is_refused_before_it_is_trained():
    with pytest.raises(InputError, match="vocab_size = 60000 is more than"):
        changed(SMALL, data__tokenizer__vocab_size=60_000).check()
    with pytest.raises(InputError, match="kind` to roberta"):
        changed(SMALL, model=RobertaConfig(), objective=MaskedLM()).check()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"{}",
        json.dumps({**to_dict(GPT2), "model": {"type": "Llama9Config"}}).encode(),
        json.dumps({**to_dict(GPT2), "mesh": 8}).encode(),
    ],
)
def test_a_config_json_that_cannot_be_read(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    for use in (read_run, lambda path: check_run_dir(in_dir(GPT2, path))):
        with pytest.raises(InputError, match="run.json is not a config"):
            use(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no run of lm_scale"):
        read_run(tmp_path)


def test_a_file_where_a_folder_should_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=f"{file}"):
        read_run(file)
    with pytest.raises(InputError, match=f"Cannot write to {file}"):
        check_run_dir(in_dir(GPT2, file))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", '"ten"', "steps = 'ten': expected int | None"),
        ("batch", "8.5", "batch = 8.5: expected int"),
        ("batch", "True", "batch = True: expected int"),
        ("optimizer", "None", "optimizer = None: expected AdamW"),
        ("model", "dict(layers=2)", "model = {'layers': 2}: expected GPT2Config"),
        ("schedule", "Schedule(decay='step')", "schedule.decay = 'step'"),
        ("schedule", "Schedule(peak='1e-3')", "fails: TypeError"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_config_file(tmp_path, field, value, said):
    path = tmp_path / "config.py"
    path.write_text(
        "from lm_scale.config import RunConfig\n"
        "from lm_scale.optim import Schedule\n"
        f"config = RunConfig(run_dir='x', **{{{field!r}: {value}}})\n"
    )
    with pytest.raises(InputError) as error:
        load_config(str(path), [], prog="test")
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["schedule__peak", "optimizer__weight_decay"])
def test_not_a_number_is_refused(name):
    with pytest.raises(InputError, match="nan"):
        changed(GPT2, **{name: float("nan")})
    with pytest.raises(InputError, match="epochs = nan"):
        changed(SMALL, steps=None, epochs=float("nan")).check()


def test_checkpoints_without_a_config_are_not_touched(tmp_path):
    config = begun(GPT2, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="has checkpoints, but .* no run.json"):
        check_run_dir(config)


def test_an_empty_run_dir_is_refused():
    with pytest.raises(InputError, match="run_dir is empty"):
        changed(SMALL, run_dir="").check()


def test_a_bracket_in_the_path_is_refused(tmp_path):
    """Orbax takes the path for a pattern, and its checkpoints are lost."""
    config = dataclasses.replace(GPT2, run_dir=str(tmp_path / "lr[1]" / "run"))
    with pytest.raises(InputError, match="holds a bracket"):
        check_run_dir(config)
    assert list(tmp_path.iterdir()) == []
