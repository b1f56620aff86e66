# SPDX-License-Identifier: Apache-2.0
"""Flags that are refused, and flags that have no effect in their company."""

from lm_scale.errors import InputError
from lm_scale.scripts.flags import Flags, MlmDataArguments, TrainingArguments


def only_evaluates(training: TrainingArguments) -> bool:
    """If the command is to train nothing."""
    return training.do_eval and not training.do_train


def refuse(flags: Flags) -> None:
    """InputError for what cannot be, before anything is loaded."""
    model, data, training = flags.model, flags.data, flags.training
    if not training.output_dir.strip():
        raise InputError("--output_dir is empty: expected the name of a folder.")
    if not model.use_fast_tokenizer:
        raise InputError("--no_use_fast_tokenizer: there are fast tokenizers only.")
    if model.trust_remote_code:
        raise InputError(
            "--trust_remote_code: code from the hub is never executed here. Leave the "
            "flag out; a model or dataset that needs it cannot be used."
        )
    if model.dtype == "float16":
        raise InputError(
            "--dtype float16 would need loss scaling, which the old scripts lacked "
            "too. Use bfloat16 or float32."
        )
    if isinstance(data, MlmDataArguments):
        for name in ("train_ref_file", "validation_ref_file"):
            if getattr(data, name) is not None:
                raise InputError(
                    f"--{name}: there is no whole-word masking; the old script read "
                    f"the flag and masked single tokens all the same. Leave it out."
                )
        if data.line_by_line and data.document_separators:
            raise InputError(
                "--document_separators: with --line_by_line no document follows "
                "another. Leave one of the two out."
            )
    held_out = data.validation_file if only_evaluates(training) else None
    if not (data.dataset_name or data.train_file or held_out):
        raise InputError("no text: give --dataset_name or --train_file.")
    if data.dataset_name is not None and data.train_file is not None:
        raise InputError(
            f"--dataset_name {data.dataset_name} and --train_file {data.train_file}: "
            f"give one of them."
        )
    if data.dataset_config_name is not None and data.dataset_name is None:
        raise InputError("--dataset_config_name needs --dataset_name.")
    if not 0 <= data.validation_split_percentage < 100:
        raise InputError(
            f"--validation_split_percentage {data.validation_split_percentage}: "
            f"expected 0 to 99."
        )
    if training.lr_scheduler_type == "constant" and training.warmup_steps:
        raise InputError(
            "--lr_scheduler_type constant has no warm-up: use constant_with_warmup, or "
            "leave --warmup_steps out."
        )
    # What RunConfig calls otherwise, by the name that the user knows.
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size",
                 "gradient_accumulation_steps"):  # fmt: skip
        if getattr(training, name) < 1:
            raise InputError(
                f"--{name} {getattr(training, name)}: expected a number above 0."
            )
    if (training.save_total_limit or 0) < 0:
        raise InputError(
            f"--save_total_limit {training.save_total_limit}: expected a number above "
            f"0, or 0 for all."
        )


def notes(flags: Flags) -> list[str]:
    """What has no effect in this combination."""
    model, data, training = flags.model, flags.data, flags.training
    found, default = [], TrainingArguments(output_dir="")
    if training.adafactor:
        for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
            if getattr(training, name) != getattr(default, name):
                found.append(f"--{name} is of AdamW; Adafactor has none.")
    if not training.push_to_hub:
        for name in ("hub_model_id", "hub_token"):
            if getattr(training, name) is not None:
                found.append(f"--{name} is not used without --push_to_hub.")
    epochs_given = training.num_train_epochs != default.num_train_epochs
    if training.max_steps not in (None, -1) and epochs_given:
        found.append("--max_steps goes before --num_train_epochs.")
    if isinstance(data, MlmDataArguments) and not data.line_by_line:
        if data.pad_to_max_length:
            found.append(
                "--pad_to_max_length: without --line_by_line the text is cut into full "
                "blocks, and there is nothing to pad."
            )
    if only_evaluates(training):
        found.append(
            f"--do_eval alone evaluates {model.model_name_or_path} and trains nothing."
            if model.model_name_or_path
            else "--do_eval alone evaluates the newest checkpoint in output_dir."
        )
        for name in ("push_to_hub", "overwrite_output_dir", "resume_from_checkpoint"):
            if getattr(training, name):
                found.append(f"--{name} is not used with --do_eval alone.")
    return found
