"""Peak memory of loading and converting weights of the size of a 32B model.

    python benchmarks/weights_memory.py [--layers=4] [--folder=runs/weights_memory] [--shards=8]

It writes a checkpoint of Qwen2.5-32B's widths (random bfloat16 in several files, some layers only;
with --sparse holes that read as zeros and take no disk) and does each of these in a process of its
own, which samples its own `RssAnon` in /proc/self/status every 2 ms: memory that the process holds
itself. Pages of mapped files are `RssFile`; the system takes those back when it needs them, so they
are counted apart. What the process had before it began is taken off.

load        `load_hf` onto one device
load_share  what one of --shards processes with a device each reads of the whole model (fsdp):
            `HFArray.read` of its slices in the pieces and the order of `load_hf`, kept as on a
            CPU device. This measures the reading by itself, not `load_hf` in so many processes
restore     `restore_params` onto one device
to_orbax    `convert --to=orbax`; to_hf: `convert --to=hf` of the result

The bound on loading is own shards + 1.3 x the largest tensor, both in the dtype that is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from kdrl_jax import convert
from kdrl_jax.data import SentencePieceTokenizer
from kdrl_jax.models import Decoder, ModelConfig, load_config, load_hf
from kdrl_jax.models.hf_files import open_hf
from kdrl_jax.models.hf_table import piece_of, pieces, table_rows
from kdrl_jax.sharding import AXES, make_mesh, param_shardings, path_name
from kdrl_jax.training.run_weights import abstract_params, restore_params

GB = 1e9
CASES = [
    "load:bfloat16",
    "load:float32",
    "load_share:bfloat16",
    "load_share:float32",
    "to_orbax",
    "restore:bfloat16",
    "restore:float32",
    "to_hf",
]


def shape(layers: int) -> ModelConfig:
    """Qwen2.5-32B with so many layers; the published model has 64."""
    return ModelConfig(
        vocab_size=152064,
        hidden_size=5120,
        num_layers=layers,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=27648,
        rope_theta=1e6,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=False,
        model_type="qwen2",
    )


def write_checkpoint(folder: Path, layers: int, sparse: bool, file_bytes: int = 5 * 10**9) -> None:
    """The synthetic checkpoint: config.json, tokenizer, safetensors files and their index."""
    model = Decoder(shape(layers))
    rows = table_rows(model.config, model.shapes()).values()
    tensors = {name: row.hf_shape for row in rows for name in row.tensors(layers)}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, size in tensors.items():
        count = 2 * math.prod(size)
        if files[-1] and held + count > file_bytes:
            files.append({})
            held = 0
        files[-1][name] = size
        held += count
    folder.mkdir(parents=True)
    weight_map = {}
    noise = np.random.default_rng(0).standard_normal(1 << 25).astype(jnp.bfloat16).tobytes()
    for i, content in enumerate(files):
        file = folder / f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for name, size in content.items():
            offsets = [end, end + 2 * math.prod(size)]
            header[name] = {"dtype": "BF16", "shape": size, "data_offsets": offsets}
            end = offsets[1]
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if not sparse:
                for start in range(0, end, len(noise)):
                    out.write(noise[: min(len(noise), end - start)])
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model.config.to_hf() | {"dtype": "bfloat16"}))
    SentencePieceTokenizer.train("0123456789+= ").save(folder)


def status(key: str) -> int:
    """A size of this process in bytes, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Peak:
    """The highest RssAnon and RssFile within a `with`, above what they were before it."""

    def __enter__(self) -> Peak:
        self.before, self.anon, self.file = status("RssAnon"), 0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._begun = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._begun
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.anon = max(self.anon, status("RssAnon") - self.before)
            self.file = max(self.file, status("RssFile"))


def read_share(folder: Path, dtype: str, shards: int) -> list[np.ndarray]:
    """What the first of `shards` devices holds of the model, read as `load_hf` reads it."""
    mesh = AbstractMesh((1, shards, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    held = []
    with open_hf(folder) as (config, arrays):
        shapes = Decoder(config).shapes()
        shardings = param_shardings(mesh, shapes)
        for (path, _), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        ):
            array = arrays[path_name(path)]
            share = sharding.shard_shape(array.shape)
            index = [slice(0, n) for n in share]
            if not array.row.stacked:
                held.append(array.read(index, dtype))
                continue
            whole = np.empty(share, dtype)
            for part in pieces(share[0], piece_of(share, dtype)):
                whole[part] = array.read([part, *index[1:]], dtype)
            held.append(whole)
    return held


def measure(case: str, folder: Path, layers: int, shards: int) -> dict[str, object]:
    """Run one case in this process."""
    name, _, dtype = case.partition(":")
    dtype = jnp.dtype(dtype or "bfloat16")
    jax.block_until_ready(jnp.zeros(8) + 1)
    model = Decoder(load_config(folder / "hf"))
    sizes = [math.prod(x.shape) * dtype.itemsize for x in jax.tree.leaves(model.shapes())]
    rows = table_rows(model.config, model.shapes()).values()
    largest = max(math.prod(row.hf_shape) for row in rows) * dtype.itemsize
    own = 0
    with Peak() as peak:
        if name == "load":
            kept = load_hf(folder / "hf", dtype=dtype)[1]
            own = sum(sizes)
        elif name == "load_share":
            kept = read_share(folder / "hf", dtype.name, shards)
            own = sum(x.nbytes for x in kept)
        elif name == "restore":
            shardings = param_shardings(make_mesh(data=1), model.shapes())
            kept = restore_params(folder / "orbax", abstract_params(model, shardings, dtype))
            own = sum(sizes)
        elif name == "to_orbax":
            kept = convert.main(["--to=orbax", str(folder / "hf"), str(folder / "orbax")])
        else:
            kept = convert.main(["--to=hf", str(folder / "orbax"), str(folder / "back")])
    del kept
    return {
        "case": case,
        "layers": layers,
        "model_gb": sum(sizes) / GB,
        "own_gb": own / GB,
        "largest_tensor_gb": largest / GB,
        "peak_anon_gb": peak.anon / GB,
        "peak_file_gb": peak.file / GB,
        "beyond_own_in_largest_tensors": (peak.anon - own) / largest,
        "seconds": peak.seconds,
    }


def main() -> None:
    """Write the checkpoint, then every case in a process of its own; one JSON line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shards", type=int, default=8, help="processes that share the model")
    parser.add_argument("--folder", type=Path, default=Path("runs/weights_memory"))
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        row = measure(args.inner, args.folder, args.layers, args.shards)
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))
        return
    shutil.rmtree(args.folder, ignore_errors=True)
    write_checkpoint(args.folder / "hf", args.layers, args.sparse)
    for case in args.cases.split(","):
        subprocess.run([sys.executable, *sys.argv, f"--inner={case}"], check=True)
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
