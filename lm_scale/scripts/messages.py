# SPDX-License-Identifier: Apache-2.0
"""What the messages about a RunConfig are called among the flags."""

import re
from collections.abc import Iterable

from lm_scale.scripts.flags import Kind

LENGTH = {"mlm": "--max_seq_length", "clm": "--block_size"}
BATCH = "--per_device_train_batch_size × devices × --gradient_accumulation_steps"
FLAG_OF = {
    "run_dir": "--output_dir",
    "batch": BATCH,
    "eval_batch": "--per_device_eval_batch_size × devices",
    "accumulate": "--gradient_accumulation_steps",
    "steps": "--max_steps",
    "epochs": "--num_train_epochs",
    "init_from": "--model_name_or_path",
    "init.grow_vocab": "--grow_vocab",
    "init.grow_positions": "--grow_positions",
    "init.layers": "--source_layers",
    "resume_from": "--resume_from_checkpoint",
    "log_every": "--logging_steps",
    "save_every": "--save_steps",
    "eval_every": "--eval_steps",
    "workers": "--preprocessing_num_workers",
    "schedule.peak": "--learning_rate",
    "schedule.warmup": "--warmup_steps",
    "schedule.decay": "--lr_scheduler_type",
    "optimizer.type": "--adafactor",
    "optimizer.beta1": "--adam_beta1",
    "optimizer.beta2": "--adam_beta2",
    "optimizer.epsilon": "--adam_epsilon",
    "optimizer.weight_decay": "--weight_decay",
    "optimizer.clip": "--max_grad_norm",
    "objective.probability": "--mlm_probability",
    "compute.dtype": "--dtype",
    "data.tokenizer.path": "--tokenizer_name",
    "data.corpus.source": "--dataset_name or --train_file",
    "data.corpus.subset": "--dataset_config_name",
    "data.corpus.text_column": "--text_column_name",
    "data.corpus.validation_source": "--validation_file",
    "data.corpus.validation_fraction": "--validation_split_percentage",
    "data.corpus.keep_linebreaks": "--keep_linebreaks",
    "data.separator": "--document_separators",
    "data.examples": "--line_by_line",
    "data.max_train_examples": "--max_train_samples",
    "data.max_eval_examples": "--max_eval_samples",
    "data.store": "--output_dir",
    "model.vocab": "the vocab_size of --config_name",
    "model.positions": "the position table of --config_name",
    "model.pad_id": "the pad_token_id of --config_name",
}
ANEW = "--overwrite_output_dir starts anew, and keeps what is there in previous-N."
RETOKENIZE = "--overwrite_cache makes the tokens anew."
# Part of a message -> what a flag can do about it.
REMEDIES = {
    "holds a run with a different config": ANEW,
    "or start anew with --resume fresh": ANEW,
    "holds a token store that differs": RETOKENIZE,
    "were made otherwise": RETOKENIZE,
    "optimizer: expected 0 <= beta": "See --adam_beta1, --adam_beta2, --adam_epsilon.",
    "optimizer: expected weight_decay": "See --weight_decay.",
    "optimizer: expected clip": "See --max_grad_norm.",
    "schedule: expected peak": "See --learning_rate and --warmup_steps.",
    "objective: expected 0 < probability": "See --mlm_probability.",
    "needs the objective CausalLM": "Use run_clm_flax.py, or lm-scale clm.",
    "needs the objective MaskedLM": "Use run_mlm_flax.py, or lm-scale mlm.",
    "do without evaluation": "--do_train alone trains without evaluation.",
    "by text_column": "The flag is --text_column_name.",
}


def fields_named(names: Iterable[str], kind: Kind) -> tuple[str, ...]:
    """The fields of a RunConfig by their own names, or those that flags go into.

    `seed` is one, `max_grad_norm` is optimizer.clip, and `gradient_accumulation_steps`
    makes both batch and accumulate.
    """
    flag_of = {"seq_len": LENGTH[kind], **FLAG_OF}
    found = []
    for name in names:
        flag = re.compile(rf"--{re.escape(name)}\b")
        found += [x for x, flags in flag_of.items() if flag.search(flags)] or [name]
    return tuple(dict.fromkeys(found))


def in_flags(message: str, kind: Kind) -> str:
    """What to add to a message: the flags behind its names, and what helps."""
    names = {"seq_len": LENGTH[kind], **FLAG_OF}
    found = []
    for name, flag in names.items():
        if mentions(message, name) or mentions(message, name.rpartition(".")[2]):
            if flag not in message:
                found.append(f"`{name}` is {flag}")
    added = [f"Here {'; '.join(found)}."] if found else []
    added += [remedy for part, remedy in REMEDIES.items() if part in message]
    return "".join(f"\n{sentence}" for sentence in added)


def mentions(message: str, name: str) -> bool:
    """If a name stands there as a setting: `name`, name = 3, name: 3 there, 4 here.

    A word alone may be just a word.
    """
    name = re.escape(name)
    sign = r"(`| = | is \S+[;:,] expected|: .* there, .* here)"
    return re.search(rf"(?<![\w.-]){name}{sign}", message) is not None
