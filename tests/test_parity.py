"""The decoder against `transformers` in torch, live: CPU, fp32. Skipped where there is no torch.

`test_models.py` compares with what `make_references.py` recorded; here the record itself is
checked, and models that no record knows are drawn at random.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import model_cases as cases
import numpy as np
import pytest

from kdrl_jax.models import load_hf, save_hf
from kdrl_jax.models.hf_table import table_rows
from kdrl_jax.sharding import make_mesh, path_name

torch = pytest.importorskip("torch", reason="torch is not installed (the `parity` extra)")

import make_references  # noqa: E402  (needs torch)
import transformers  # noqa: E402

pytestmark = pytest.mark.parity
BOUND = 1e-4

ROPE_KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
]
FAMILIES = ("qwen2", "qwen3", "llama")
DRAWN = [(family, seed) for family in FAMILIES for seed in (1, 2)]


def draw_config(family: str, seed: int) -> dict[str, Any]:
    """A random small config.json; the kinds of RoPE scaling take turns."""
    turn = seed + FAMILIES.index(family)
    rng = np.random.default_rng([seed, turn])
    kv_heads, share = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    heads = kv_heads * share
    head_dim = 2 * int(rng.integers(3, 11))
    free = family != "qwen2"  # Qwen2 has head_dim = hidden_size / heads
    config = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": cases.VOCAB,
        "hidden_size": heads * (int(rng.integers(6, 20)) if free else head_dim),
        "intermediate_size": int(rng.integers(20, 120)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": float(10.0 ** -rng.integers(5, 7)),
        "tie_word_embeddings": bool(seed % 2),
        "rope_parameters": ROPE_KINDS[turn % len(ROPE_KINDS)]
        | {"rope_theta": float(rng.choice([100.0, 10_000.0, 1e6]))},
    }
    return config | ({"head_dim": head_dim} if free else {})


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, positions, segment_ids):
    return model.logits(params, model.apply(params, tokens, positions, segment_ids))


@pytest.mark.parametrize(("family", "seed"), DRAWN)
@torch.no_grad()
def test_logits_of_random_models(family, seed, tmp_path):
    """Every real token of full, padded and packed rows."""
    config = draw_config(family, seed)
    tensors = cases.random_tensors(config, seed)
    ours = load_hf(cases.write_folder(tmp_path / "model", config, tensors))
    tokens, positions, ids = cases.rows()
    logits = np.asarray(logits_of(*ours, tokens, positions, ids))
    theirs = make_references.torch_model(config, seed)

    # Segments one by one, which owes nothing to any masking.
    real = ids > 0
    alone = make_references.torch_logits(theirs)
    assert alone[real].std() > 0.3
    assert np.abs(logits - alone)[real].max() <= BOUND
    # The full, left-padded and right-padded rows as transformers itself is given them.
    rows = [torch.from_numpy(x[:3].astype(np.int64)) for x in (tokens, real, positions)]
    batch = theirs(input_ids=rows[0], attention_mask=rows[1], position_ids=rows[2]).logits.numpy()
    assert np.abs(logits[:3] - batch)[real[:3]].max() <= BOUND


def test_random_models_cover_what_matters():
    configs = [draw_config(*drawn) for drawn in DRAWN]
    kinds = {c["rope_parameters"]["rope_type"] for c in configs}
    assert kinds == {kind["rope_type"] for kind in ROPE_KINDS}
    assert len({c["num_hidden_layers"] for c in configs}) > 1
    assert any(c["num_attention_heads"] > c["num_key_value_heads"] > 1 for c in configs)
    assert any(c["num_attention_heads"] * c.get("head_dim", 0) > c["hidden_size"] for c in configs)


@pytest.mark.parametrize("name", cases.CASES)
def test_the_record_is_what_transformers_computes(name):
    recorded = np.load(cases.REFERENCES)[name]
    model = make_references.torch_model(cases.CASES[name])
    live = make_references.torch_logits(model)[:, :: cases.STRIDE]
    assert np.abs(live - recorded).max() <= 2e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3_untied_yarn"])
def test_gradients_agree(name, tmp_path):
    """Of the mean cross-entropy over packed and padded rows, for every tensor."""
    config = cases.CASES[name]
    model, params = load_hf(cases.write_folder(tmp_path / "model", config))
    tokens, positions, ids = cases.rows()
    follows = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        hidden = model.apply(params, tokens, positions, ids)
        log_probs = jax.nn.log_softmax(model.logits(params, hidden[:, :-1]))
        picked = jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(follows, picked, 0.0).sum() / follows.sum()

    loss, grads = ours(params)

    theirs = make_references.torch_model(config)
    total = sum(
        torch.nn.functional.cross_entropy(
            theirs(input_ids=torch.from_numpy(x)[None]).logits[0, :-1],
            torch.from_numpy(x[1:]),
            reduction="sum",
        )
        for x in cases.segments()
    ) / int(follows.sum())
    total.backward()
    expected = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-6)

    leaves = {path_name(p): np.asarray(g) for p, g in jax.tree_util.tree_leaves_with_path(grads)}
    compared = 0
    for path, row in table_rows(model.config, model.shapes()).items():
        for layer, tensor in enumerate(row.tensors(model.config.num_layers)):
            grad = row.write(leaves[path][layer] if "{layer}" in row.tensor else leaves[path])
            assert np.abs(expected[tensor]).max() > 1e-6 or tensor.endswith("k_proj.bias")
            scale = max(np.abs(expected[tensor]).max(), 1e-3)
            assert np.abs(grad - expected[tensor]).max() <= BOUND * scale, tensor
            compared += 1
    assert compared == len(expected)


@pytest.mark.parametrize("name", cases.CASES)
def test_an_export_reloads_in_transformers(name, tmp_path):
    """Bit for bit: the weights by their names, the config by its effect on the logits."""
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    model, params = load_hf(cases.write_folder(tmp_path / "in", cases.CASES[name]), mesh)
    save_hf(tmp_path / "out", model, params, eos_ids=(3,), max_shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    reloaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    assert reloaded.dtype == torch.float32
    assert reloaded.generation_config.eos_token_id == 3
    before = make_references.torch_logits(make_references.torch_model(cases.CASES[name]))
    np.testing.assert_array_equal(make_references.torch_logits(reloaded.eval()), before)
