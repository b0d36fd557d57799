"""Adapters written as PEFT reads them. No torch, no PEFT.

Names and layouts are those of `peft` 0.21: `lora_A.weight` is `[r, inputs]` and `lora_B.weight`
`[outputs, r]`, of each layer's projection by its Hugging Face name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.hf_files import write_json
from kdrl_jax.models.hf_save import whole_folder
from kdrl_jax.models.hf_table import ROWS
from kdrl_jax.models.lora import LEAVES, LoRA
from kdrl_jax.sharding import path_name
from kdrl_jax.types import Params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def save_peft(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    lora: LoRA,
    adapters: Params,
    base: str,
    revision: str | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` reads.

    Args:
      config: of the model that they are adapters of.
      adapters: host arrays, stacked over layers.
      base: the model's folder, or name on the hub, to be written down.
      revision: of `base` on the hub.
    """
    with whole_folder(Path(folder)) as partial:
        save_file(peft_tensors(config, adapters), partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, peft_config(lora, base, revision))


def peft_tensors(config: ModelConfig, adapters: Params) -> dict[str, np.ndarray]:
    """The adapters by PEFT's names, in its layout."""
    names = {path: tensor for path, tensor, _ in ROWS}
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(adapters):
        projection, _, leaf = path_name(path).rpartition("/")
        tensor = names[f"{projection}/kernel"].removesuffix("weight")
        for layer in range(config.num_layers):
            y = np.asarray(x[layer])
            # Inputs in front and r behind, or r in front and outputs behind.
            y = y.reshape(-1, y.shape[-1]) if leaf == LEAVES[0] else y.reshape(len(y), -1)
            name = f"{PREFIX}{tensor.format(layer=layer)}lora_{leaf[-1].upper()}.weight"
            found[name] = np.ascontiguousarray(y.T)
    return found


def peft_config(lora: LoRA, base: str, revision: str | None = None) -> dict[str, Any]:
    """What adapter_config.json says."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
