# SPDX-License-Identifier: Apache-2.0
"""Our RoBERTa with weights that others have trained: Sapiens (tests/sapiens.py).

Random weights hide what trained ones show: order of norms, exact GELU, the offset of
the positions, the tied output. The reference figures come from a forward pass in numpy.
"""

import os
import pickle
from typing import Any

import jax
import numpy as np
import parity
import pytest
import sapiens
from flax import nnx

from lm_scale.objectives import IGNORE, MaskedLM, NoiseKeys
from lm_scale.sharding import MeshShape, make_mesh
from lm_scale.step import make_eval_step

DRAWS = 64  # of the masks of one chain; one draw has about 17 of them
LOGITS = 2e-5  # of the largest logit; measured: 3e-6 (f32, sums in another order)


def real_weights(test):
    return pytest.mark.slow(pytest.mark.live(test))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Chain -> Hugging Face folder."""
    root = tmp_path_factory.mktemp("sapiens")
    try:
        wheel = sapiens.download(root)
    except OSError as error:
        pytest.skip(f"cannot download sapiens 1.0.2 from PyPI: {error}")
    for name in sapiens.MODELS:
        checkpoint = wheel / "sapiens" / "models" / "v1" / f"checkpoint_{name}.pt"
        sapiens.write_folder(checkpoint, root / name)
    return {name: root / name for name in sapiens.MODELS}


def evaluated(folder, batch):
    """What our evaluation step adds up over a batch, on 8 devices."""
    mesh = make_mesh(MeshShape(data=8))
    with jax.set_mesh(mesh):
        model, params = parity.load(folder, mesh)
        sums = make_eval_step(model)(params, parity.place_rows(batch, mesh))
        return {name: float(x) for name, x in sums.items()}


def our_logits(folder, tokens):
    mesh = parity.one_device()
    with jax.set_mesh(mesh):
        model, params = parity.load(folder, mesh)
        graphdef = nnx.split(model)[0]

        @jax.jit
        def run(params, tokens):
            model = nnx.merge(graphdef, params)
            return model.head(model(tokens))

        return np.asarray(run(params, parity.place_rows(tokens, mesh)))


def their_logits(folder, tokens):
    torch = pytest.importorskip("torch")
    from transformers import RobertaForMaskedLM

    loaded: Any = RobertaForMaskedLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not {name: x for name, x in info.items() if x}  # missing or unknown names
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.numpy()


def one_by_one(chain):
    """A row for each residue, with that residue masked."""
    tokens = sapiens.encode(chain)
    residues = np.arange(1, tokens.size - 1)
    rows = np.arange(residues.size)
    hidden = np.tile(tokens, (residues.size, 1))
    labels = np.full_like(hidden, IGNORE)
    hidden[rows, residues] = sapiens.MASK
    labels[rows, residues] = tokens[residues]
    return {"tokens": hidden, "labels": labels}


def masked_at_random(chain):
    """Draws of the 15 % that our objective hides."""
    tokens = sapiens.encode(chain)
    keys = NoiseKeys(7, np.arange(DRAWS), np.zeros(DRAWS, np.int64))
    rows = np.tile(tokens, (DRAWS, 1))
    return MaskedLM().examples(rows, sapiens.VOCABULARY, keys)


@real_weights
def test_masked_residues_of_trastuzumab(folders):
    sums = evaluated(folders["vh"], one_by_one(sapiens.CHAINS["vh"]))
    assert sums["count"] == 120
    assert sums["correct"] == 92
    pseudo_perplexity = np.exp(sums["loss"] / sums["count"])
    assert pseudo_perplexity == pytest.approx(2.75, abs=0.005)


@real_weights
@pytest.mark.parametrize("name", sapiens.MODELS)
def test_same_guesses_as_transformers(folders, name):
    batch = masked_at_random(sapiens.CHAINS[name])
    masked = batch["labels"] != IGNORE
    assert len(set(masked.sum(1))) > 5  # uneven rows
    reference = their_logits(folders[name], batch["tokens"])
    logits = our_logits(folders[name], batch["tokens"])
    assert parity.relative_error(logits, reference) < LOGITS
    guesses = reference.argmax(-1)[masked]
    np.testing.assert_array_equal(logits.argmax(-1)[masked], guesses)
    sums = evaluated(folders[name], batch)
    assert sums["count"] == masked.sum()
    assert sums["correct"] == (guesses == batch["labels"][masked]).sum()


# --- Opening a pickle must not run code -----------------------------------------------


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", range(4))  # each of the file's pickles
def test_code_in_a_pickle_is_refused(tmp_path, place):
    trap = tmp_path / "trap"
    path = tmp_path / "checkpoint.pt"
    with path.open("wb") as file:
        for number in range(place + 1):
            pickle.dump(MakesFolder(trap) if number == place else 0, file, protocol=2)
    with pytest.raises(pickle.UnpicklingError, match="mkdir is not on the list"):
        sapiens.read_checkpoint(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(MakesFolder(trap)))  # the trap is a trap
    assert trap.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"torch\nload",
        b"collections\n_sys",
        b"argparse\n_sys.modules",
    ],
)
def test_other_names_are_refused(tmp_path, name):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"c" + name + b"\n.")
    with pytest.raises(pickle.UnpicklingError, match="not on the list"):
        sapiens.read_checkpoint(path)
