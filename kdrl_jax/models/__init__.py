"""Decoders: their shape, their computation, and their Hugging Face form."""

from kdrl_jax.models.config import ModelConfig, RopeScaling
from kdrl_jax.models.hf import load_hf
from kdrl_jax.models.hf_files import load_config, load_eos_ids
from kdrl_jax.models.hf_peft import save_peft
from kdrl_jax.models.hf_save import merged_leaves, save_hf
from kdrl_jax.models.int8 import quantize
from kdrl_jax.models.qwen import REMAT, Decoder

__all__ = [
    "REMAT",
    "Decoder",
    "ModelConfig",
    "RopeScaling",
    "load_config",
    "load_eos_ids",
    "load_hf",
    "merged_leaves",
    "quantize",
    "save_hf",
    "save_peft",
]
