# SPDX-License-Identifier: Apache-2.0
"""The flags of run_mlm_flax.py and run_clm_flax.py, and those that we add.

Names, types and defaults are the old scripts', so that old commands, JSON files and
`.args` files work; `transformers.HfArgumentParser` reads them. What a flag does here is
in its help; where that differs from the old scripts, docs/migration.md says why.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lm_scale.errors import InputError, one_line

Kind = Literal["mlm", "clm"]


def flag(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Model, configuration and tokenizer."""

    model_name_or_path: str | None = flag(
        None,
        "Folder or hub name of weights to start from, or a checkpoint of a run "
        "(RUN/checkpoints/STEP). Unset: random weights.",
    )
    model_type: str | None = flag(
        None,
        "Architecture (roberta, gpt2, llama ...): its default shape, if alone.",
    )
    config_name: str | None = flag(
        None,
        "Folder, hub name or known shape (roberta-base, gpt2 ...) of the model's "
        "config, if it is not the model's own.",
    )
    tokenizer_name: str | None = flag(
        None, "Folder or hub name of the tokenizer, if it is not the model's own."
    )
    cache_dir: str | None = flag(
        None, "Where downloads and the Arrow files of the data are kept."
    )
    use_fast_tokenizer: bool = flag(
        True, "Always so: the tokens are made by Rust tokenizers only."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = flag(
        "float32",
        "Type of the computation; weights and optimizer are float32 either way. "
        "float16 is refused: it needs loss scaling. TPUs want bfloat16.",
    )
    token: str | None = flag(
        None,
        "Token for private models and data of the hub. Better by HF_TOKEN in the "
        "environment: all users of a machine see its processes' flags.",
    )
    trust_remote_code: bool = flag(
        False, "Refused: code from the hub is never executed."
    )
    # --- Not in the old scripts ---
    grow_vocab: bool = flag(
        False,
        "Add rows for the tokens, of the tokenizer or of config_name, that the weights "
        "of model_name_or_path lack.",
    )
    grow_positions: bool = flag(
        False, "Add rows for the positions of config_name that the weights lack."
    )
    source_layers: list[int] | None = flag(
        None,
        "Layers of the weights, from 0, that become the model's, which config_name "
        "gives as many. Unset: all.",
    )


@dataclass
class DataArguments:
    """Text, and how examples are made of it."""

    dataset_name: str | None = flag(
        None, "Dataset on the hub, or a folder with txt, csv, json or parquet files."
    )
    dataset_config_name: str | None = flag(
        None, "Configuration of the dataset (of a folder: its subfolder)."
    )
    train_file: str | None = flag(
        None, "Training text instead: a txt, csv, json, jsonl or parquet file, or glob."
    )
    validation_file: str | None = flag(None, "Held-out text, of any of these kinds.")
    overwrite_cache: bool = flag(
        False, "Tokenize anew, even if output_dir holds the tokens of this text."
    )
    validation_split_percentage: int = flag(
        5, "The first so many percent are held out if the data has no validation split."
    )
    preprocessing_num_workers: int | None = flag(
        None,
        "Processes that read files (unset: one) and threads that tokenize (unset: one "
        "for each CPU).",
    )
    max_train_samples: int | None = flag(
        None, "Train on so many examples, the first; no more text is tokenized."
    )
    max_eval_samples: int | None = flag(None, "Evaluate on so many examples.")
    # --- Not in the old scripts ---
    text_column_name: str | None = flag(
        None, "Column that holds the text. Unset: `text`, or else the first of strings."
    )
    streaming: bool = flag(
        False,
        "Read the text as a stream, without an Arrow copy on disk. Held out are then "
        "documents chosen by a hash: the length of a stream is not known.",
    )
    document_separators: bool = flag(
        False, "An end-of-text token after each document, where none stands there."
    )


@dataclass
class MlmDataArguments(DataArguments):
    """Text, and how examples are made of it."""

    train_ref_file: str | None = flag(
        None, "Refused: there is no whole-word masking (the old script had none)."
    )
    validation_ref_file: str | None = flag(None, "Refused, as train_ref_file.")
    max_seq_length: int | None = flag(
        None, "Tokens of an example. Unset: the most that tokenizer and model allow."
    )
    mlm_probability: float = flag(0.15, "Share of tokens to be predicted.")
    pad_to_max_length: bool = flag(
        False,
        "With line_by_line: pad all batches to max_seq_length. Without: to their "
        "longest line (a multiple of 16). Blocks are full in either case.",
    )
    line_by_line: bool = flag(
        False, "Each line is an example. Without: text is cut into full blocks."
    )


@dataclass
class ClmDataArguments(DataArguments):
    """Text, and how examples are made of it."""

    block_size: int | None = flag(
        None,
        "Tokens of an example. Unset: the most that the tokenizer allows, and at most "
        "1024 if that is more than the model allows.",
    )
    keep_linebreaks: bool = flag(True, "Keep the line breaks of txt files.")


@dataclass
class TrainingArguments:
    """Training."""

    output_dir: str = field(
        metadata={"help": "Folder for all that the run writes; `~` is your home."}
    )
    overwrite_output_dir: bool = flag(
        False,
        "Start anew in a folder that is not empty. A former run's files are moved to "
        "output_dir/previous-N; nothing is deleted.",
    )
    do_train: bool = flag(
        False, "Train. With neither do_train nor do_eval: both, as the old MLM script."
    )
    do_eval: bool = flag(
        False, "Evaluate at the end and write eval_results.json. Alone: only that."
    )
    per_device_train_batch_size: int = flag(
        8, "Sequences of a step for each device, whatever the mesh."
    )
    per_device_eval_batch_size: int = flag(8, "The same for evaluation.")
    learning_rate: float = flag(5e-5, "The highest, after the warm-up.")
    weight_decay: float = flag(
        0.0, "Of AdamW, for all weights but biases and layer norms."
    )
    adam_beta1: float = flag(0.9, "Of AdamW.")
    adam_beta2: float = flag(0.999, "Of AdamW.")
    adam_epsilon: float = flag(1e-8, "Of AdamW.")
    adafactor: bool = flag(False, "Adafactor instead of AdamW.")
    num_train_epochs: float = flag(3.0, "Passes over the training text.")
    warmup_steps: int = flag(0, "Steps in which the learning rate rises from 0.")
    logging_steps: int = flag(500, "Steps between lines in the logs.")
    save_steps: int = flag(500, "Steps between checkpoints; the last step has one too.")
    eval_steps: int | None = flag(
        None, "Steps between evaluations. Unset: at the end only."
    )
    seed: int = flag(42, "Of weights, order of the data, masking and dropout.")
    push_to_hub: bool = flag(False, "Upload the model at each save, in the background.")
    hub_model_id: str | None = flag(
        None, "Repository to upload to. Unset: the name of output_dir."
    )
    hub_token: str | None = flag(
        None, "Token that may write to it. Better by HF_TOKEN, as with token."
    )
    gradient_checkpointing: bool = flag(
        False, "Compute activations again in the backward pass: slower, less memory."
    )
    # --- Not in the old scripts ---
    gradient_accumulation_steps: int = flag(
        1, "Batches whose gradients make one step, the loss averaged over all labels."
    )
    max_steps: int | None = flag(None, "Train so many steps, not num_train_epochs.")
    max_grad_norm: float | None = flag(
        None, "Scale gradients down to this norm. Unset: never, as the old scripts."
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup"
    ] = flag("linear", "The learning rate after the warm-up.")
    resume_from_checkpoint: str | None = flag(
        None,
        "Unset: go on if output_dir holds this run, else start. `true`: go on or fail; "
        "`false`: start or fail. Or the folder of another run, or one of its "
        "checkpoints (RUN/checkpoints/STEP), to go on from in output_dir.",
    )
    override: list[str] | None = flag(
        None,
        "What may differ from the run in output_dir when it goes on: these flags, or "
        "fields as a refusal lists them, with blanks between.",
    )
    save_total_limit: int | None = flag(2, "Checkpoints to keep, the newest. 0: all.")
    mesh: str | None = flag(
        None, "Devices along each mesh axis, as in data=-1,fsdp=1,tensor=1 (-1: rest)."
    )
    report_to: str = flag(
        "tensorboard", "tensorboard, wandb, both with a comma between, or none."
    )
    logging_first_step: bool = flag(False, "A line in the logs for the first step too.")


@dataclass(frozen=True)
class Flags:
    """All the flags of a command."""

    kind: Kind
    model: ModelArguments
    data: MlmDataArguments | ClmDataArguments
    training: TrainingArguments


def parse(kind: Kind, argv: list[str], prog: str, args_file: Path | None) -> Flags:
    """Reads flags, or the one JSON file that stands for them.

    args_file: flags in a file, which go before `argv` if the file exists.
    Raises InputError for an unknown flag and for JSON that does not fit. `--help` and a
    wrong value end the process (argparse: 0 and 2).
    """
    from transformers import HfArgumentParser

    data = MlmDataArguments if kind == "mlm" else ClmDataArguments
    groups: Any = (ModelArguments, data, TrainingArguments)
    parser: Any = HfArgumentParser(
        groups,
        prog=prog,
        usage=f"{prog} --output_dir FOLDER [--flag value ...], or {prog} FLAGS.json",
    )
    if len(argv) == 1 and argv[0].endswith(".json"):
        return Flags(kind, *_parse_json(parser, argv[0]))
    before = []
    if args_file is not None and args_file.is_file():
        before = args_file.read_text().split()
    *parts, unknown = parser.parse_args_into_dataclasses(
        before + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].partition("=")[0]
        raise InputError(
            f"unknown flag {name!r}{_nearest(name, parser)}; `{prog} --help` lists all."
        )
    return Flags(kind, *parts)


def _parse_json(parser: Any, path: str) -> list[Any]:
    from lm_scale.config import check_types

    try:
        parts = parser.parse_json_file(path)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot read the flags in {path}: {one_line(error)}."
        ) from error
    for part in parts:
        check_types(part)
    return list(parts)


def _nearest(name: str, parser: Any) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    found = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    found = found or difflib.get_close_matches(name, known, 1)
    return f" (did you mean {found[0]}?)" if found else ""
