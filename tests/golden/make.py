# SPDX-License-Identifier: Apache-2.0
"""Writes the reference numbers beside this file: needs torch, which the tests do not.

    PYTHONPATH=tests NPROC=16 python tests/golden/make.py

One .npz for each case of tests/parity.py, with transformers' config.json, the weights,
the inputs and what transformers makes of them in torch. To be run again when a case
changes; tests/models/test_parity_golden.py compares.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import parity


def main():
    folder = Path(__file__).parent
    for case, (config, inputs) in parity.CASES.items():
        tensors = parity.random_tensors(config)
        result = parity.theirs(config, inputs, tensors)
        given = {
            f"inputs.{name}": x
            for name, x in dataclasses.asdict(inputs).items()
            if x is not None
        }
        weights = {f"weights.{name}": x for name, x in tensors.items()}
        gradients = {f"gradients.{name}": x for name, x in result.gradients.items()}
        path = folder / f"{case}.npz"
        np.savez_compressed(
            path,
            config=np.array(json.dumps(config.to_hf())),
            logits=result.logits,
            loss=result.loss,
            **given,
            **weights,
            **gradients,
        )
        print(f"{path}: {path.stat().st_size:,} bytes, loss {result.loss:.4f}")


if __name__ == "__main__":
    main()
