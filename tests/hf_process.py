# SPDX-License-Identifier: Apache-2.0
"""One of several processes that read a Hugging Face folder and export it in parts.

`python hf_process.py COORDINATOR PROCESSES PROCESS FROM TO MAX_SHARD` prints as JSON
how many elements it read and which files it wrote.
"""

import json
import sys
from pathlib import Path

import jax

from lm_scale import hf, hf_shards
from lm_scale.data.tokenizer import load_tokenizer
from lm_scale.models import build_model
from lm_scale.models.compute import Compute
from lm_scale.sharding import MeshShape, make_mesh
from lm_scale.weight_files import StoredTensor


def main(coordinator: str, processes: int, process: int, source, target, most: int):
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    jax.distributed.initialize(coordinator, processes, process)
    done = {"read": 0, "wrote": []}
    read, save = StoredTensor.__getitem__, hf_shards.save_file

    def counted(self, index):
        found = read(self, index)
        done["read"] += found.size
        return found

    def noted(tensors, path, metadata):
        save(tensors, path, metadata)
        done["wrote"].append(path.name)

    StoredTensor.__getitem__, hf_shards.save_file = counted, noted
    hf_shards.MAX_SHARD = most
    config = hf.read_config(source)
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2))
    params = hf.read_params(source, build_model(config, Compute()), mesh)
    tokenizer = load_tokenizer(Path(source))
    with jax.set_mesh(mesh):  # as the trainer does
        hf.export(config, params, tokenizer, target)
    assert (Path(target) / hf_shards.SAFETENSORS_INDEX).exists()  # for each of them
    done["wrote"] = []
    hf.export(config, params, tokenizer, target)  # over it, as the command line does
    print(json.dumps(done))


if __name__ == "__main__":
    address, count, number, *folders, size = sys.argv[1:]
    main(address, int(count), int(number), *folders, int(size))
