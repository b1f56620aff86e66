# SPDX-License-Identifier: Apache-2.0
"""From the old scripts' flags to a RunConfig."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lm_scale import shapes
from lm_scale.config import DataConfig, RunConfig
from lm_scale.console import say
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import (
    TokenizerConfig,
    describe_roles,
    load_tokenizer,
    vocabulary_size,
)
from lm_scale.errors import InputError
from lm_scale.models import Compute, ModelConfig, family_of_type
from lm_scale.objectives import CausalLM, MaskedLM
from lm_scale.optim import Adafactor, AdamW, Schedule
from lm_scale.scripts.checks import notes, refuse
from lm_scale.scripts.flags import (
    ClmDataArguments,
    Flags,
    MlmDataArguments,
    ModelArguments,
    TrainingArguments,
)
from lm_scale.scripts.messages import fields_named
from lm_scale.shapes import hf_config
from lm_scale.sharding import MeshShape, parse_mesh_shape
from lm_scale.warm_start import WarmStart


def run_config(flags: Flags, console: Console) -> RunConfig:
    """The run that the flags describe, on the devices there are.

    Loads tokenizer and model config, and prints what it had to decide. Raises
    InputError for a flag that is refused and for flags that contradict one another.
    """
    refuse(flags)
    for note in notes(flags):
        say(console, f"Note: {note}")
    model, data, training = flags.model, flags.data, flags.training
    announce_downloads(model, console)
    tokenizer_name = model.tokenizer_name or model.model_name_or_path
    if tokenizer_name is None:
        raise InputError(
            "no tokenizer: give --tokenizer_name (a folder, made by `lm-scale "
            "tokenizer`, or a hub name) or --model_name_or_path."
        )
    tokenizer = load_tokenizer(
        kept_tokenizer(training) or tokenizer_name, cache_dir=model.cache_dir
    )
    say(console, describe_roles(tokenizer))
    shape = fitted(model_config(model), model, tokenizer, console)
    length = sequence_length(data, tokenizer, shape, console)
    evaluate = training.do_eval or not training.do_train
    steps = None if training.max_steps == -1 else training.max_steps  # as transformers
    accumulate = training.gradient_accumulation_steps
    devices = jax.device_count()
    return RunConfig(
        run_dir=str(output_dir(training)),
        model=shape,
        objective=CausalLM()
        if isinstance(data, ClmDataArguments)
        else MaskedLM(probability=data.mlm_probability),
        data=data_config(data, tokenizer_name, model.cache_dir),
        optimizer=optimizer(training),
        schedule=Schedule(
            peak=training.learning_rate,
            warmup=training.warmup_steps,
            decay=DECAY[training.lr_scheduler_type],
        ),
        seq_len=length,
        batch=training.per_device_train_batch_size * devices * accumulate,
        accumulate=accumulate,
        eval_batch=training.per_device_eval_batch_size * devices,
        steps=steps,
        epochs=training.num_train_epochs if steps is None else None,
        seed=training.seed,
        init_from=model.model_name_or_path,
        init=warm_start(model),
        resume_from=resume_from(training),
        override=fields_named(training.override or [], flags.kind),
        mesh=MeshShape() if training.mesh is None else parse_mesh_shape(training.mesh),
        compute=Compute(
            dtype="bfloat16" if model.dtype == "bfloat16" else "float32",
            remat="full" if training.gradient_checkpointing else "none",
            loss_chunk=max(1, -(-length // LOSS_CHUNKS)),
        ),
        log_every=training.logging_steps,
        log_first=training.logging_first_step,
        report_to=reporters(training.report_to),
        eval_every=training.eval_steps,
        eval_at_end=evaluate,
        save_every=training.save_steps,
        keep=training.save_total_limit or None,
        hub=hub_repository(training),
    )


# --- The parts ------------------------------------------------------------------------

LOSS_CHUNKS = 8  # parts of a sequence, of whose logits there is one at a time

DECAY: dict[str, Any] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


def output_dir(training: TrainingArguments) -> Path:
    return Path(training.output_dir).expanduser()


def kept_tokenizer(training: TrainingArguments) -> Path | None:
    """The tokenizer of a run that is gone on with; output_dir may hold another one."""
    kept = output_dir(training) / "data" / "tokenizer"
    if training.overwrite_output_dir or not (kept / "recipe.json").exists():
        return None
    return kept


def data_config(
    data: MlmDataArguments | ClmDataArguments, tokenizer: str, cache_dir: str | None
) -> DataConfig:
    """The text and how examples are made of it."""
    masked = isinstance(data, MlmDataArguments)
    lines = masked and data.line_by_line
    corpus = CorpusConfig(
        source=str(data.dataset_name or data.train_file or data.validation_file),
        subset=data.dataset_config_name,
        text_column=data.text_column_name,
        keep_linebreaks=not masked and data.keep_linebreaks,
        # In running text the empty lines part its paragraphs.
        keep_blank=not masked and data.keep_linebreaks and not data.document_separators,
        validation_source=data.validation_file,
        validation_fraction=data.validation_split_percentage / 100,
        holdout="hash" if data.streaming else "first",
        streaming=data.streaming,
    )
    return DataConfig(
        corpus=corpus,
        tokenizer=TokenizerConfig(path=tokenizer),
        separator=data.document_separators,
        examples="documents" if lines else "blocks",
        pad_to_seq_len=masked and data.pad_to_max_length and lines,
        max_train_examples=data.max_train_samples,
        max_eval_examples=data.max_eval_samples,
        cache_dir=cache_dir,
        workers=data.preprocessing_num_workers,
    )


def optimizer(training: TrainingArguments) -> AdamW | Adafactor:
    if training.adafactor:
        return Adafactor(clip=training.max_grad_norm)
    return AdamW(
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        clip=training.max_grad_norm,
    )


def announce_downloads(model: ModelArguments, console: Console) -> None:
    """Says what is no folder: a mistyped one would wait for the network in silence."""
    names = {model.model_name_or_path, model.tokenizer_name}
    if model.config_name not in shapes.SHAPES:
        names.add(model.config_name)
    for name in sorted(name for name in names if name is not None):
        if not Path(name).expanduser().exists():
            say(console, f"{name} is no folder here: asking the Hugging Face hub ...")


def model_config(model: ModelArguments) -> ModelConfig:
    """The model's shape: from config_name, else the weights', else model_type's own."""
    name = model.config_name or model.model_name_or_path
    if name is not None:
        found = hf_config(name, cache_dir=model.cache_dir)
    elif model.model_type is not None:
        found = default_config(model.model_type)
    else:
        raise InputError(
            "no model: give --model_name_or_path, --config_name or --model_type."
        )
    if model.model_type not in (None, found.model_type):
        raise InputError(
            f"--model_type {model.model_type}, but {name} is a {found.model_type}. "
            f"Leave --model_type out."
        )
    return shapes.model_config(found)


def default_config(model_type: str) -> Any:
    """What transformers makes of a model type alone."""
    from transformers import AutoConfig

    family_of_type(model_type, "--model_type")  # transformers may know it, or not
    return AutoConfig.for_model(model_type)


def fitted(
    shape: ModelConfig, model: ModelArguments, tokenizer, console: Console
) -> ModelConfig:
    """The shape, with room for the tokenizer where the weights are yet to be made."""
    size, pad_id = vocabulary_size(tokenizer), getattr(shape, "pad_id", None)
    if model.model_name_or_path is not None:
        if size > shape.vocab and model.grow_vocab:
            return dataclasses.replace(shape, vocab=size)
        if size > shape.vocab:
            raise InputError(
                f"The tokenizer has {size} tokens, the weights have rows for "
                f"{shape.vocab}. The old scripts kept GPT-2's tokenizer with one token "
                f"too many: give the tokenizer.json that it was trained with by "
                f"--tokenizer_name. For new tokens, --grow_vocab adds rows."
            )
        return shape
    changes = {}
    if size > shape.vocab:
        changes["vocab"] = size
    wanted = tokenizer.pad_token_id
    if pad_id is not None and wanted is not None and pad_id != wanted:
        changes["pad_id"] = tokenizer.pad_token_id
    for name, value in changes.items():
        say(
            console,
            f"Note: {name} {getattr(shape, name)} -> {value}, as the tokenizer asks.",
        )
    return dataclasses.replace(shape, **changes)


def sequence_length(
    data: MlmDataArguments | ClmDataArguments,
    tokenizer,
    shape: ModelConfig,
    console: Console,
) -> int:
    """Tokens of an example, by the old scripts' rules."""
    most = tokenizer.model_max_length  # 1e30 where the tokenizer does not know
    if isinstance(data, MlmDataArguments):
        name, wanted = "max_seq_length", data.max_seq_length
        default = min(most, shape.positions)
    else:
        name, wanted = "block_size", data.block_size
        default = most if most <= shape.positions else min(1024, shape.positions)
    if wanted is None:
        return default
    if wanted > most:
        say(
            console,
            f"Note: --{name} {wanted} is more than the tokenizer's model_max_length: "
            f"{most} is used.",
        )
    return min(wanted, most)


def warm_start(model: ModelArguments) -> WarmStart:
    chosen = model.source_layers
    return WarmStart(
        grow_vocab=model.grow_vocab,
        grow_positions=model.grow_positions,
        layers=None if chosen is None else tuple(chosen),
    )


def reporters(text: str) -> tuple[Any, ...]:
    """`tensorboard,wandb` -> ("tensorboard", "wandb"); `none` and empty -> ()."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return () if names == ["none"] else tuple(dict.fromkeys(names))


def resume_from(training: TrainingArguments) -> str | None:
    """The other run to go on from, if that is what the flag means."""
    asked = training.resume_from_checkpoint
    if asked is None or asked.lower() in ("true", "false"):
        return None
    return asked


def hub_repository(training: TrainingArguments) -> str | None:
    if not training.push_to_hub:
        return None
    return training.hub_model_id or output_dir(training).resolve().name
