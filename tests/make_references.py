"""Record the logits of `transformers` (torch, CPU, fp32) for the cases of `model_cases.py`.

    python tests/make_references.py [SMOLLM2_FOLDER]

Each segment is run by itself, without padding or packing, so that the recorded logits owe nothing
to any masking. The file keeps every third token of each row, and RoPE frequencies. With a folder
that `launch/smollm2.py` wrote it also records that model's likeliest tokens; without, what the
file holds of them is kept.
"""

from __future__ import annotations

import copy
import sys

import numpy as np
import torch
import transformers
from model_cases import (
    CASES,
    LENGTH,
    PLACES,
    REFERENCES,
    ROPE_CASES,
    SMOLLM2_TEXTS,
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


@torch.no_grad()
def smollm2_record(folder: str, keep: int = 5) -> dict[str, np.ndarray]:
    """For each text its ids, and at each of them the likeliest next tokens and their logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    out = {}
    for i, text in enumerate(SMOLLM2_TEXTS):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        logits = model.float().eval()(input_ids=ids[None]).logits[0]
        best = logits.topk(keep)
        out |= {
            f"smollm2/{i}/ids": ids.numpy().astype(np.int32),
            f"smollm2/{i}/top": best.indices.numpy().astype(np.int32),
            f"smollm2/{i}/logits": best.values.numpy(),
            f"smollm2/{i}/logsumexp": logits.logsumexp(-1).numpy(),
        }
    return out


if __name__ == "__main__":
    arrays = {name: torch_logits(torch_model(c))[:, ::STRIDE] for name, c in CASES.items()}
    arrays |= {f"rope/{name}": torch_frequencies(c) for name, c in ROPE_CASES.items()}
    if len(sys.argv) > 1:
        arrays |= smollm2_record(sys.argv[1])
    elif REFERENCES.exists():
        arrays |= {k: v for k, v in np.load(REFERENCES).items() if k.startswith("smollm2/")}
    np.savez_compressed(REFERENCES, **arrays)
    print(f"{REFERENCES.name}: {REFERENCES.stat().st_size / 1e3:.0f} KB")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
