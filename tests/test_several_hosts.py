"""Two processes of two devices each: weights that no process holds whole, through every format."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import model_cases as cases
from commands import finish, xla_flags
from safetensors.numpy import load_file

from kdrl_jax.data import SentencePieceTokenizer

WORKER = """
import sys
from pathlib import Path
import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, work, piece = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, index)

import numpy as np
from kdrl_jax.data import load_tokenizer
from kdrl_jax.models import hf_table, load_hf, save_hf
from kdrl_jax.sharding import make_mesh, param_shardings
from kdrl_jax.training.run_weights import abstract_params, restore_params, save_params
from kdrl_jax.training.roles import keep_model

hf_table.PIECE_BYTES = piece
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
read, whole = [0], hf_table.HFArray.read

def counted(self, *args):
    block = whole(self, *args)
    read[0] += block.size
    return block

hf_table.HFArray.read = counted
folder, run = work / "in", work / "run"
mesh = make_mesh(fsdp=2, tensor=2, data=1)
model, params = load_hf(folder, mesh, "bfloat16")
assert not any(x.is_fully_addressable for x in jax.tree.leaves(params))
own = sum(len({str(s.index) for s in x.addressable_shards}) and
          sum({str(s.index): s.data.size for s in x.addressable_shards}.values())
          for x in jax.tree.leaves(params))
assert read[0] == own < 0.6 * model.config.num_params, (read, own)  # only what it holds
tokenizer = load_tokenizer(folder)
keep_model(run, model.config, tokenizer, lambda at: save_params(at, params), folder)
# Restored onto another layout, and cast there.
other = param_shardings(make_mesh(fsdp=4, data=1), model.shapes())
found = restore_params(run, abstract_params(model, other, "float32"))
save_hf(work / "out", model, found, dtype="bfloat16", config_folder=run / "model",
        tokenizer_folder=run / "model", max_shard_bytes=60_000)
save_hf(work / "out", model, found, dtype="bfloat16", config_folder=run / "model",
        tokenizer_folder=run / "model", max_shard_bytes=60_000, overwrite=True)
assert (work / "out" / "config.json").is_file()
jax.distributed.shutdown()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_load_save_restore_and_export_over_two_processes(tmp_path):
    config = cases.CASES["qwen3_untied_yarn"] | {
        "num_key_value_heads": 2,
        "torch_dtype": "bfloat16",
    }
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in cases.random_tensors(config).items()}
    folder = cases.write_folder(tmp_path / "in", config, tensors)
    SentencePieceTokenizer.train("0123456789+= ").save(folder)
    root = str(Path(__file__).parent.parent)
    env = os.environ | {
        "XLA_FLAGS": xla_flags(2),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    piece = 8_000  # so that stacks are filled in place, some layers at a time
    command = [sys.executable, "-c", WORKER, str(free_port())]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path), str(piece)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said, codes = finish(workers, "two processes that load, save and export")
    assert codes == [0, 0], "\n".join(said)[-6000:]

    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out", "run"]  # no leftovers
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: x for file in files for name, x in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes(), name
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
