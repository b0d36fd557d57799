"""Record the logits of `transformers` (torch, CPU, fp32) for the cases of `model_cases.py`.

    python tests/make_references.py

Each segment is run by itself, without padding or packing, so that the recorded logits owe nothing
to any masking. The file keeps every third token of each row, and RoPE frequencies.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers
from model_cases import (
    CASES,
    LENGTH,
    PLACES,
    REFERENCES,
    ROPE_CASES,
    STRIDE,
    VOCAB,
    random_tensors,
    segments,
)


def torch_model(config: dict, seed: int = 0) -> torch.nn.Module:
    """The torch model of a config.json with `random_tensors`; strict about their names."""
    # transformers edits nested dicts of what it is given.
    fields = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    hf = transformers.AutoConfig.for_model(config["model_type"], **fields)
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float()
    tensors = {k: torch.from_numpy(v) for k, v in random_tensors(config, seed).items()}
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()


@torch.no_grad()
def torch_logits(model: torch.nn.Module) -> np.ndarray:
    """Logits [4, 64, V] at the places of `rows()`, zero at padding; each segment run alone."""
    out = np.zeros((4, LENGTH, VOCAB), np.float32)
    for segment, row, start in PLACES:
        x = segments()[segment]
        logits = model(input_ids=torch.from_numpy(x)[None]).logits[0]
        out[row, start : start + len(x)] = logits.numpy()
    return out


def torch_frequencies(config: dict) -> np.ndarray:
    """Inverse frequencies, and the factor on cos and sin as the last element."""
    fields = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    fields |= {"num_hidden_layers": 1}
    hf = transformers.AutoConfig.for_model(config["model_type"], **fields)
    rotary = transformers.AutoModelForCausalLM.from_config(hf).model.rotary_emb
    return np.append(rotary.inv_freq.numpy(), np.float32(rotary.attention_scaling))


if __name__ == "__main__":
    arrays = {name: torch_logits(torch_model(c))[:, ::STRIDE] for name, c in CASES.items()}
    arrays |= {f"rope/{name}": torch_frequencies(c) for name, c in ROPE_CASES.items()}
    np.savez_compressed(REFERENCES, **arrays)
    print(f"{REFERENCES.name}: {REFERENCES.stat().st_size / 1e3:.0f} KB")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
