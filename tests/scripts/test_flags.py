# SPDX-License-Identifier: Apache-2.0
"""Every flag of the old scripts: its type, its default, and its effect."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import write_corpus
from transformers import AutoTokenizer, GPT2Config, RobertaConfig

from lm_scale import hf
from lm_scale.config import RunConfig
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer
from lm_scale.errors import InputError, flatten
from lm_scale.models import Compute, build_model
from lm_scale.models import RobertaConfig as Roberta
from lm_scale.objectives import MaskedLM
from lm_scale.run_json import check_run_dir, to_dict, write_config
from lm_scale.scripts.flags import ModelArguments, parse
from lm_scale.scripts.messages import FLAG_OF, in_flags
from lm_scale.scripts.translate import model_config, run_config
from lm_scale.start import set_up

QUIET = Console(quiet=True)
REQUIRED = object()
# The specification: name -> default, of the last version of the scripts.
TRAINING = {
    "output_dir": REQUIRED, "overwrite_output_dir": False, "do_train": False,
    "do_eval": False, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    "learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8, "adafactor": False, "num_train_epochs": 3.0,
    "warmup_steps": 0, "logging_steps": 500, "save_steps": 500, "eval_steps": None,
    "seed": 42, "push_to_hub": False, "hub_model_id": None, "hub_token": None,
    "gradient_checkpointing": False,
}  # fmt: skip
MODEL = {
    "model_name_or_path": None, "model_type": None, "config_name": None,
    "tokenizer_name": None, "cache_dir": None, "use_fast_tokenizer": True,
    "dtype": "float32", "token": None, "trust_remote_code": False,
}  # fmt: skip
DATA = {
    "dataset_name": None, "dataset_config_name": None, "train_file": None,
    "validation_file": None, "overwrite_cache": False,
    "validation_split_percentage": 5, "preprocessing_num_workers": None,
}  # fmt: skip
OWN_DATA = {
    "mlm": {
        "train_ref_file": None, "validation_ref_file": None, "max_seq_length": None,
        "mlm_probability": 0.15, "pad_to_max_length": False, "line_by_line": False,
    },
    "clm": {
        "block_size": None, "max_train_samples": None, "max_eval_samples": None,
        "keep_linebreaks": True,
    },
}  # fmt: skip
ADDED = {
    "gradient_accumulation_steps", "max_steps", "max_grad_norm", "lr_scheduler_type",
    "resume_from_checkpoint", "save_total_limit", "mesh", "report_to",
    "logging_first_step", "streaming", "document_separators", "max_train_samples",
    "max_eval_samples", "text_column_name", "override",
    "grow_vocab", "grow_positions", "source_layers",
}  # fmt: skip


def original(kind: str) -> dict:
    own = dict(OWN_DATA[kind])
    training = dict(TRAINING)
    if kind == "clm":
        del training["gradient_checkpointing"]  # which the MLM script alone had
    return training | MODEL | DATA | own


def fields(flags) -> dict:
    return {**vars(flags.model), **vars(flags.data), **vars(flags.training)}


@pytest.mark.parametrize(("kind", "count"), [("mlm", 44), ("clm", 41)])
def test_all_the_old_flags_with_their_defaults(kind, count):
    old, ours = original(kind), fields(parse(kind, ["--output_dir=x"], "prog", None))
    assert len(old) == count
    for name, default in old.items():
        if default is not REQUIRED:
            assert ours[name] == default and type(ours[name]) is type(default), name
    extra = {"gradient_checkpointing"} if kind == "clm" else set()
    assert set(ours) == set(old) | ADDED | extra


# --- Forms ----------------------------------------------------------------------------


def test_json_args_file_and_both_spellings_agree(tmp_path):
    argv = ["--output_dir", "o", "--max_seq_length=64", "--no_use_fast_tokenizer",
            "--do_train", "--do_eval", "False", "--adam_beta2", "0.98"]  # fmt: skip
    spelt = [a.replace("_", "-") if a.startswith("--") else a for a in argv]
    values = {"output_dir": "o", "max_seq_length": 64, "use_fast_tokenizer": False,
              "do_train": True, "do_eval": False, "adam_beta2": 0.98}  # fmt: skip
    (tmp_path / "flags.json").write_text(json.dumps(values))
    (tmp_path / "run.args").write_text("--adam_beta2 0.98 --output_dir other\n")
    expected = parse("mlm", argv, "prog", None)
    assert (
        expected.training.adam_beta2 == 0.98 and not expected.model.use_fast_tokenizer
    )
    assert parse("mlm", spelt, "prog", None) == expected
    assert parse("mlm", [str(tmp_path / "flags.json")], "prog", None) == expected
    # The command line goes before the file.
    assert parse("mlm", argv[:-2], "prog", tmp_path / "run.args") == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('{"output_dir": "o", "learning_rate": "3e-4"}', "learning_rate = '3e-4'"),
        ('{"output_dir": "o", "lerning_rate": 1}', "lerning_rate"),
        ('{"learning_rate": 1.0}', "output_dir"),
        ('{"output_dir": "o"', "cannot read the flags"),
        ('{"output_dir": "o", "dtype": "fp8"}', "dtype = 'fp8'"),
    ],
)
def test_wrong_json_is_one_sentence(tmp_path, values, message):
    (tmp_path / "flags.json").write_text(values)
    with pytest.raises(InputError, match=message):
        parse("mlm", [str(tmp_path / "flags.json")], "prog", None)
    with pytest.raises(InputError, match="missing.json"):
        parse("mlm", [str(tmp_path / "missing.json")], "prog", None)


def test_an_unknown_flag_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"'--do_trian' \(did you mean --do_train"):
        parse("clm", ["--output_dir=o", "--do_trian"], "prog", None)
    with pytest.raises(InputError, match="unknown flag '--mlm_probability'"):
        parse("clm", ["--output_dir=o", "--mlm_probability=0.2"], "prog", None)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse("mlm", ["--help"], "lm-scale mlm", None)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in set(original("mlm")) | ADDED:
        assert f"--{name}" in shown


# --- Effects --------------------------------------------------------------------------

SHAPES = {
    "mlm": RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=42, type_vocab_size=1,
        layer_norm_eps=1e-5,
    ),
    "clm": GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_inner=24, n_positions=40,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Corpora, and for each kind a folder with tokenizer, config and weights."""
    home = tmp_path_factory.mktemp("flags")
    text = write_corpus(home / "text").read_text().splitlines()
    write_corpus(home / "set" / "part")
    (home / "held.txt").write_text("the dog sat\n" * 9)
    for kind, family in (("mlm", "roberta"), ("clm", "gpt2")):
        config = TokenizerConfig(kind=family, vocab_size=300)
        tokenizer = train_tokenizer(text, config, max_length=40)
        tokenizer.save_pretrained(home / kind)
        SHAPES[kind].save_pretrained(home / kind)
        tokenizer.save_pretrained(home / f"{kind}-other")
        wide = SHAPES[kind].to_dict() | {"hidden_size": 32, "n_embd": 32}
        type(SHAPES[kind])(**wide).save_pretrained(home / f"{kind}-other")
        shape = hf.read_config(home / kind)
        model = build_model(shape, Compute())
        weights = random_weights(model)
        hf.export(shape, weights, tokenizer, home / f"{kind}-weights")
    return home


def random_weights(model):
    import jax
    import numpy as np

    from lm_scale.sharding import map_declarations

    rng = np.random.default_rng(0)
    return map_declarations(
        model,
        lambda _, w: jax.device_put(np.float32(rng.normal(size=w.get_value().shape))),
    )


def base(kind: str, home: Path) -> list[str]:
    return [
        f"--output_dir={home}/out", f"--config_name={home}/{kind}",
        f"--tokenizer_name={home}/{kind}", f"--train_file={home}/text/corpus.txt",
    ]  # fmt: skip


def translated(kind: str, argv: list[str]):
    return run_config(parse(kind, argv, "prog", None), QUIET)


BATCH = 8 * 8  # 8 devices
BOTH = ("mlm", "clm")
# Flag, value -> the fields of RunConfig that change, and to what. `{home}` is a folder.
EFFECTS = [
    (BOTH, "output_dir", "{home}/elsewhere", {"run_dir": "{home}/elsewhere"}),
    (BOTH, "do_train", "True", {"eval_at_end": False}),
    (BOTH, "per_device_train_batch_size", "5", {"batch": 40}),
    (BOTH, "per_device_eval_batch_size", "5", {"eval_batch": 40}),
    (BOTH, "learning_rate", "3e-4", {"schedule.peak": 3e-4}),
    (BOTH, "weight_decay", "0.01", {"optimizer.weight_decay": 0.01}),
    (BOTH, "adam_beta1", "0.8", {"optimizer.beta1": 0.8}),
    (BOTH, "adam_beta2", "0.98", {"optimizer.beta2": 0.98}),
    (BOTH, "adam_epsilon", "1e-6", {"optimizer.epsilon": 1e-6}),
    (BOTH, "num_train_epochs", "2.5", {"epochs": 2.5}),
    (BOTH, "warmup_steps", "9", {"schedule.warmup": 9}),
    (BOTH, "logging_steps", "7", {"log_every": 7}),
    (BOTH, "save_steps", "7", {"save_every": 7}),
    (BOTH, "eval_steps", "7", {"eval_every": 7}),
    (BOTH, "seed", "7", {"seed": 7}),
    (BOTH, "push_to_hub", "True", {"hub": "out"}),
    (BOTH, "gradient_checkpointing", "True", {"compute.remat": "full"}),
    (BOTH, "gradient_accumulation_steps", "2", {"accumulate": 2, "batch": 2 * BATCH}),
    (BOTH, "max_steps", "9", {"steps": 9, "epochs": None}),
    (BOTH, "max_grad_norm", "1.0", {"optimizer.clip": 1.0}),
    (BOTH, "lr_scheduler_type", "cosine", {"schedule.decay": "cosine"}),
    (BOTH, "resume_from_checkpoint", "{home}/x", {"resume_from": "{home}/x"}),
    (BOTH, "override", "learning_rate", {"override": ["schedule.peak"]}),
    (BOTH, "save_total_limit", "5", {"keep": 5}),
    (BOTH, "save_total_limit", "0", {"keep": None}),
    (BOTH, "mesh", "data=2,fsdp=-1", {"mesh.data": 2, "mesh.fsdp": -1}),
    (BOTH, "mesh", "tensor=-1", {"mesh.data": 1, "mesh.tensor": -1}),
    (BOTH, "report_to", "tensorboard,wandb", {"report_to": ["tensorboard", "wandb"]}),
    (BOTH, "report_to", "none", {"report_to": []}),
    (BOTH, "logging_first_step", "True", {"log_first": True}),
    (BOTH, "config_name", "{home}/{kind}-other", {"model.embed": 32}),
    (BOTH, "cache_dir", "{home}/cache", {"data.cache_dir": "{home}/cache"}),
    (BOTH, "dtype", "bfloat16", {"compute.dtype": "bfloat16"}),
    (BOTH, "model_name_or_path", "{home}/{kind}-weights",
     {"init_from": "{home}/{kind}-weights"}),
    (BOTH, "grow_vocab", "True", {"init.grow_vocab": True}),
    (BOTH, "grow_positions", "True", {"init.grow_positions": True}),
    (BOTH, "source_layers", "1", {"init.layers": [1]}),
    (BOTH, "tokenizer_name", "{home}/{kind}-weights",
     {"data.tokenizer.path": "{home}/{kind}-weights"}),
    (BOTH, "train_file", "{home}/held.txt", {"data.corpus.source": "{home}/held.txt"}),
    (BOTH, "validation_file", "{home}/held.txt",
     {"data.corpus.validation_source": "{home}/held.txt"}),
    (BOTH, "validation_split_percentage", "20",
     {"data.corpus.validation_fraction": 0.2}),
    (BOTH, "preprocessing_num_workers", "2", {"data.workers": 2}),
    (BOTH, "max_train_samples", "50", {"data.max_train_examples": 50}),
    (BOTH, "max_eval_samples", "50", {"data.max_eval_examples": 50}),
    (BOTH, "streaming", "True",
     {"data.corpus.streaming": True, "data.corpus.holdout": "hash"}),
    (("mlm",), "document_separators", "True", {"data.separator": True}),
    (("clm",), "document_separators", "True",
     {"data.separator": True, "data.corpus.keep_blank": False}),
    (BOTH, "text_column_name", "body", {"data.corpus.text_column": "body"}),
    (("mlm",), "max_seq_length", "24", {"seq_len": 24, "compute.loss_chunk": 3}),
    (("mlm",), "mlm_probability", "0.3", {"objective.probability": 0.3}),
    (("mlm",), "line_by_line", "True", {"data.examples": "documents"}),
    (("clm",), "block_size", "24", {"seq_len": 24, "compute.loss_chunk": 3}),
    (("clm",), "keep_linebreaks", "False",
     {"data.corpus.keep_linebreaks": False, "data.corpus.keep_blank": False}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [(kind, *rest) for kinds, *rest in EFFECTS for kind in kinds],
)
def test_a_flag_changes_what_it_should_and_nothing_else(
    home, kind, name, value, expected
):
    def fill(x):
        return x.format(home=home, kind=kind) if isinstance(x, str) else x

    argv = base(kind, home)
    before = flatten(to_dict(translated(kind, argv)))
    after = flatten(to_dict(translated(kind, [*argv, f"--{name}={fill(value)}"])))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert {key: after[key] for key in changed} == {
        key: fill(x) for key, x in expected.items()
    }


# What is not told by RunConfig alone, or needs other flags: where it is tested.
ELSEWHERE = {
    "do_eval": "test_commands.py", "overwrite_output_dir": "test_folder.py",
    "overwrite_cache": "test_commands.py", "token": "test_commands.py",
    "hub_token": "test_commands.py", "hub_model_id": "below", "adafactor": "below",
    "model_type": "below", "dataset_name": "below", "dataset_config_name": "below",
    "pad_to_max_length": "below", "use_fast_tokenizer": "refused",
    "trust_remote_code": "refused", "train_ref_file": "refused",
    "validation_ref_file": "refused",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOTH)
def test_no_flag_is_left_untested(kind):
    tested = {name for kinds, name, *_ in EFFECTS if kind in kinds} | set(ELSEWHERE)
    assert set(fields(parse(kind, ["--output_dir=x"], "prog", None))) <= tested


def test_adafactor_takes_the_place_of_adamw(home):
    config = translated("clm", [*base("clm", home), "--adafactor", "--max_grad_norm=2"])
    assert to_dict(config.optimizer) == {"type": "Adafactor", "clip": 2.0}


def test_hub_model_id_names_the_repository(home):
    argv = [*base("mlm", home), "--push_to_hub", "--hub_model_id=me/model"]
    assert translated("mlm", argv).hub == "me/model"


def test_dataset_name_and_config_name_stand_for_a_folder(home):
    argv = [a for a in base("mlm", home) if "train_file" not in a]
    argv += [f"--dataset_name={home}/set", "--dataset_config_name=part"]
    corpus = translated("mlm", argv).data.corpus
    assert (corpus.source, corpus.subset) == (f"{home}/set", "part")
    assert corpus.holdout == "first" and not corpus.streaming


@pytest.mark.parametrize("name", ["bert", "gpt5"])
def test_a_model_type_that_is_not_ours(name):
    """Whether transformers has it or not."""
    model = ModelArguments(model_type=name)
    with pytest.raises(InputError, match=f"--model_type: .*{name}.* not supp.*gpt2, "):
        model_config(model)


def test_model_type_alone_is_a_default_shape(home):
    argv = [a for a in base("clm", home) if "config_name" not in a]
    config = translated("clm", [*argv, "--model_type=gpt2"])
    assert (config.model.layers, config.model.embed) == (12, 768)
    argv = [a for a in base("mlm", home) if "config_name" not in a]
    config = translated("mlm", [*argv, "--config_name=roberta-base"])  # no network
    assert config.model.positions == 512 and config.model.vocab == 50_265


@pytest.mark.parametrize("lines", [False, True])
def test_pad_to_max_length_is_of_lines(home, lines):
    argv = [*base("mlm", home), "--pad_to_max_length"]
    config = translated("mlm", argv + ["--line_by_line"] * lines)
    assert config.data.pad_to_seq_len == lines


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        ("clm", ["--no_use_fast_tokenizer"], "fast tokenizers only"),
        ("clm", ["--trust_remote_code"], "never executed"),
        ("clm", ["--dtype=float16"], "loss scaling"),
        ("mlm", ["--train_ref_file=x"], "whole-word masking"),
        ("mlm", ["--validation_ref_file=x"], "whole-word masking"),
        ("mlm", ["--line_by_line", "--document_separators"], "one of the two"),
        ("clm", ["--dataset_name=x"], "give one of them"),
        ("clm", ["--dataset_config_name=x"], "needs --dataset_name"),
        ("clm", ["--validation_split_percentage=100"], "expected 0 to 99"),
        ("clm", ["--lr_scheduler_type=constant", "--warmup_steps=1"], "no warm-up"),
        ("clm", ["--per_device_train_batch_size=0"], "--per_device_train_batch_size 0"),
        ("clm", ["--gradient_accumulation_steps=0"], "expected a number above 0"),
        ("clm", ["--save_total_limit=-1"], "save_total_limit -1"),
        ("clm", ["--mesh=data=2,tonsor=4"], "'tonsor=4' is not axis=size"),
        ("clm", ["--mesh=data"], "'data' is not axis=size"),
        ("clm", ["--report_to=mlflow"], "report_to names 'mlflow': expected tens"),
        ("clm", ["--model_type=roberta"], "Leave --model_type out"),
        ("clm", ["--config_name={home}/missing"], "missing"),
        ("clm", ["--tokenizer_name={home}/missing"], "missing"),
        ("clm", ["--logging_steps=0"], "log_every = 0"),
        ("clm", ["--max_steps=0"], "steps = 0"),
        ("clm", ["--adam_beta1=1.5"], "beta"),
        ("mlm", ["--mlm_probability=1.5"], "probability = 1.5"),
        ("mlm", ["--max_seq_length=0"], "seq_len = 0"),
        ("clm", ["--mesh=tensor=3"], "does not fit 8 device"),
        ("clm", ["--config_name={home}/mlm", "--tokenizer_name={home}/mlm"],
         "needs the objective MaskedLM"),
    ],
)  # fmt: skip
def test_refused(home, kind, argv, message):
    argv = base(kind, home) + [a.format(home=home) for a in argv]
    with pytest.raises(InputError, match=message):
        set_up(translated(kind, argv))


@pytest.mark.parametrize("missing", ["train_file", "tokenizer_name", "config_name"])
def test_what_must_be_given(home, missing):
    argv = [a for a in base("clm", home) if missing not in a]
    with pytest.raises(InputError, match="^no (text|tokenizer|model)"):
        translated("clm", argv)


@pytest.mark.parametrize(
    ("kind", "argv", "note"),
    [
        ("clm", ["--adafactor", "--weight_decay=0.1"], "--weight_decay is of AdamW"),
        ("clm", ["--hub_model_id=x"], "not used without --push_to_hub"),
        ("clm", ["--max_steps=3", "--num_train_epochs=2"], "goes before"),
        ("mlm", ["--pad_to_max_length"], "nothing to pad"),
        ("clm", ["--block_size=99"], "model_max_length: 40 is used"),
        ("clm", [], "bos/eos/unk <|endoftext|> 0"),
    ],
)
def test_notes(home, kind, argv, note):
    console = Console(record=True, width=500, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    run_config(parse(kind, base(kind, home) + argv, "prog", None), console)
    assert note in console.export_text()


def test_the_vocabulary_grows_to_the_tokenizers(home, tmp_path):
    small = SHAPES["mlm"].to_dict() | {"vocab_size": 100, "pad_token_id": 0}
    RobertaConfig(**small).save_pretrained(tmp_path)
    config = translated("mlm", [*base("mlm", home), f"--config_name={tmp_path}"])
    assert (config.model.vocab, config.model.pad_id) == (300, 1)
    weights = [f"--model_name_or_path={home}/mlm-weights", f"--config_name={tmp_path}"]
    with pytest.raises(InputError, match="weights have rows for 100"):
        translated("mlm", base("mlm", home) + weights)


@pytest.mark.parametrize(
    ("kind", "positions", "known", "given", "length"),
    [
        ("mlm", 39, 10**30, None, 39), ("mlm", 39, 20, None, 20),
        ("mlm", 39, 20, 30, 20), ("mlm", 39, 30, 20, 20),
        ("clm", 39, 10**30, None, 39), ("clm", 2048, 10**30, None, 1024),
        ("clm", 2048, 2048, None, 2048), ("clm", 39, 20, None, 20),
        ("clm", 39, 20, 30, 20),
    ],
)  # fmt: skip
def test_the_length_of_an_example(home, kind, positions, known, given, length):
    """seed-scripts.md, section 2c."""
    from lm_scale.scripts.translate import sequence_length

    tokenizer = AutoTokenizer.from_pretrained(home / kind)
    tokenizer.model_max_length = known
    shape = dataclasses.replace(hf.read_config(home / kind), positions=positions)
    flag = {"mlm": "max_seq_length", "clm": "block_size"}[kind]
    argv = ["--output_dir=x"] + ([f"--{flag}={given}"] if given else [])
    data = parse(kind, argv, "prog", None).data
    assert sequence_length(data, tokenizer, shape, QUIET) == length


def test_messages_name_the_flags(home, tmp_path):
    argv = [*base("mlm", home), "--max_seq_length=40"]
    small = SHAPES["mlm"].to_dict() | {"max_position_embeddings": 32}
    RobertaConfig(**small).save_pretrained(tmp_path)
    argv.append(f"--config_name={tmp_path}")
    with pytest.raises(InputError, match="seq_len = 40 is longer") as error:
        set_up(translated("mlm", argv))
    assert "`seq_len` is --max_seq_length" in in_flags(str(error.value), "mlm")
    assert "`seq_len` is --block_size" in in_flags(str(error.value), "clm")
    assert in_flags("Some steps of a mesh, in a batch of many.", "mlm") == ""


def test_going_on_with_other_flags_names_them(home, tmp_path):
    """The message of check_run_dir speaks of the config."""
    config = translated("clm", base("clm", home))
    write_config(dataclasses.replace(config, run_dir=str(tmp_path)))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    other = [*base("clm", home), f"--output_dir={tmp_path}", "--learning_rate=1",
             "--per_device_train_batch_size=3"]  # fmt: skip
    with pytest.raises(InputError) as error:
        check_run_dir(translated("clm", other))
    added = in_flags(str(error.value), "clm")
    assert "`schedule.peak` is --learning_rate" in added
    assert "`batch` is --per_device_train_batch_size × devices" in added
    assert "--overwrite_output_dir starts anew" in added


def test_what_may_differ_is_named_by_fields_or_flags(home, tmp_path):
    argv = [*base("clm", home), "--override", "--gradient_accumulation_steps", "seed"]
    with pytest.raises(SystemExit):  # argparse: two hyphens begin a flag
        translated("clm", argv)
    for names, fields in (
        (["seed", "optimizer"], ["seed", "optimizer"]),
        (["block_size", "seq_len"], ["seq_len"]),
        (["gradient_accumulation_steps"], ["batch", "accumulate"]),
        (["max_seq_length"], ["max_seq_length"]),  # of the other script
    ):
        config = translated("clm", [*base("clm", home), "--override", *names])
        assert config.override == tuple(fields)
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    with pytest.raises(InputError, match="override names 'max_seq_length'"):
        check_run_dir(config)


def test_the_names_in_messages_are_fields():
    """The words that `in_flags` translates exist in the configs."""
    config = RunConfig(run_dir="x", model=Roberta(), objective=MaskedLM())
    for name in FLAG_OF:
        assert name in flatten(to_dict(config)) or name == "workers", name


@pytest.mark.parametrize("path", ["", "/checkpoints/7"])
def test_a_checkpoint_to_go_on_from_must_exist(home, tmp_path, path):
    argv = [*base("clm", home), f"--resume_from_checkpoint={tmp_path}{path}"]
    with pytest.raises(InputError, match="expected the folder of a run") as error:
        check_run_dir(translated("clm", argv))
    assert "--resume_from_checkpoint" in in_flags(str(error.value), "clm")


def test_given_weights_and_a_tokenizer_with_one_token_too_many(home, tmp_path):
    """As in the folders of the old script: <|endoftext|> behind the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(home / "clm-weights")
    tokenizer.add_tokens(["one-more"])
    tokenizer.save_pretrained(tmp_path)
    argv = [*base("clm", home), f"--model_name_or_path={home}/clm-weights"]
    with pytest.raises(InputError, match="one token too many"):
        translated("clm", [*argv, f"--tokenizer_name={tmp_path}"])
    config = translated("clm", [*argv, f"--tokenizer_name={tmp_path}", "--grow_vocab"])
    assert config.model.vocab == len(tokenizer) and config.init.grow_vocab
    set_up(config)


def test_a_refused_warm_start_names_the_flags(home):
    weights = f"--model_name_or_path={home}/clm-weights"
    argv = [*base("clm", home), weights, f"--config_name={home}/clm-other"]
    with pytest.raises(InputError) as error:
        set_up(translated("clm", argv))
    assert "embed: " in str(error.value)
    message = "vocab: 1 there, 2 here (`init.grow_vocab` allows it)"
    assert "`init.grow_vocab` is --grow_vocab" in in_flags(message, "clm")
