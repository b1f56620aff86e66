# SPDX-License-Identifier: Apache-2.0
"""lm_scale pre-trains language models from text, from a laptop to a TPU pod.

    text -- tokenizer -- token store -- example i -- batch of step n -- train_step
         -- checkpoint -- Hugging Face model

A tour, in reading order: `sharding` (mesh, rules, `param`), `models.layers` and
`models.gpt2` (what a model is), `losses` and `step` (what one step does), `trainer`
(the loop). Around them: `data` and `objectives` (what a batch is), `optim`,
`checkpoint`, `evaluate`, `generate`, `hf`, `metrics`, `config` and the command line.

Importing this package imports nothing heavy: jax must not be imported before the
command line has said how many CPU devices to simulate.
"""

__version__ = "0.1.0"
