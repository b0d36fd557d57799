"""Small models for the tests: config.json contents, seeded weights and padded or packed rows.

Tensor names and shapes are spelled out here a second time on purpose: they are the oracle of the
loader's table, and `make_references.py` checks them against torch's `transformers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LENGTH, VOCAB = 64, 64
REFERENCES = Path(__file__).parent / "references.npz"
STRIDE = 3  # references keep every third token of a row

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
_QWEN2 = _BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_QWEN3 = _BASE | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 20}
_LLAMA = _BASE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

CASES: dict[str, dict[str, Any]] = {
    # Qwen2 ships a window that it does not use.
    "qwen2": _QWEN2
    | {
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 2,
    },
    "qwen2_tied_yarn": _QWEN2
    | {
        "tie_word_embeddings": True,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen3_tied": _QWEN3
    | {
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "qwen3_untied_yarn": _QWEN3
    | {
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
    "llama_tied": _LLAMA | {"tie_word_embeddings": True, "rope_theta": 100000.0},
    "llama3": _LLAMA
    | {
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "llama_linear": _LLAMA
    | {
        "tie_word_embeddings": True,
        "head_dim": 8,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "llama_yarn_factor": _LLAMA
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 2.0,
            "attention_factor": 1.3,
            "original_max_position_embeddings": 128,
        },
    },
}


# RoPE settings of published checkpoints; everything else is cut down.
ROPE_CASES: dict[str, dict[str, Any]] = {
    "qwen2.5_yarn": _BASE
    | {
        "model_type": "qwen2",
        "hidden_size": 256,
        "num_attention_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "llama3.2": _BASE
    | {
        "model_type": "llama",
        "hidden_size": 128,
        "num_attention_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


# What `references.npz` holds SmolLM2-135M-Instruct's likeliest tokens for.
SMOLLM2_TEXTS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n2 + 3 = 5",
    "The sum of the first n odd numbers is n^2: 1 + 3 = 4, 1 + 3 + 5 = 9, and 1 + 3 + 5 + 7 = 16. "
    "Die Hauptstadt von Frankreich ist Paris, and \\boxed{42} is 6 * 7.\n\n"
    "def square(x):\n    return x * x\n",
)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, as `transformers` saves them."""
    d, f, n = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    k, h = config["num_key_value_heads"], config.get("head_dim", d // n)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (n * h, d),
            "self_attn.k_proj.weight": (k * h, d),
            "self_attn.v_proj.weight": (k * h, d),
            "self_attn.o_proj.weight": (d, n * h),
            "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
        }
        if config["model_type"] == "qwen2":
            layer |= {f"self_attn.{p}_proj.bias": (c * h,) for p, c in zip("qkv", (n, k, k))}  # noqa: B905
        if config["model_type"] == "qwen3":
            layer |= {f"self_attn.{p}_norm.weight": (h,) for p in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that make every part matter: logits of order one, uneven norms, real biases."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        x = rng.standard_normal(shape)
        if len(shape) == 2:
            x = x * (1.5 / np.sqrt(shape[1]))
        elif name.endswith("norm.weight"):
            x = 1 + 0.3 * x
        else:
            x = 0.3 * x
        tensors[name] = x.astype(np.float32)
    return tensors


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """A checkpoint folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def segments() -> list[np.ndarray]:
    """Token sequences that `rows` pads and packs."""
    rng = np.random.default_rng(7)
    return [rng.integers(1, VOCAB, n) for n in (LENGTH, 41, 50, 30, 22)]


# (segment, row, first column) of each of `segments()`: a full row, a left-padded one, a
# right-padded one, and one that packs two segments before some padding.
PLACES = ((0, 0, 0), (1, 1, LENGTH - 41), (2, 2, 0), (3, 3, 0), (4, 3, 30))


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions, segment ids) [4, 64] with `segments()` placed as PLACES says."""
    tokens, positions, ids = (np.zeros((4, LENGTH), np.int32) for _ in range(3))
    for segment, row, start in PLACES:
        x = segments()[segment]
        place = (row, slice(start, start + len(x)))
        tokens[place], positions[place], ids[place] = x, np.arange(len(x)), segment + 1
    return tokens, positions, ids
