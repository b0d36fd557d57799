"""The decoder against recorded logits of `transformers`, and against itself.

`test_parity.py` does the former live, where torch is installed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_cases as cases
import numpy as np
import pytest

from kdrl_jax.models import REMAT, Decoder, ModelConfig, RopeScaling, attention, load_hf
from kdrl_jax.models.layers import rope_frequencies
from kdrl_jax.rollout.decode import join_recent
from kdrl_jax.sharding import param_spec, path_name
from kdrl_jax.types import KVCache, UserError

BOUND = 1e-4


@pytest.fixture(scope="module")
def references():
    return np.load(cases.REFERENCES)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """The (model, params) of a case, loaded once."""

    @functools.cache
    def one(name: str):
        return load_hf(cases.write_folder(tmp_path_factory.mktemp(name), cases.CASES[name]))

    return one


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, positions, segment_ids):
    return model.logits(params, model.apply(params, tokens, positions, segment_ids))


TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=24,
)


@pytest.fixture(scope="module")
def tiny():
    """A small model with `init`'s weights."""
    model = Decoder(TINY)
    return model, jax.jit(model.init)(jax.random.key(1))


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_agree_with_recorded_transformers(name, load, references):
    """Full, left-padded, right-padded and packed rows, against segments run one by one."""
    tokens, positions, ids = cases.rows()
    logits = np.asarray(logits_of(*load(name), tokens, positions, ids))
    real = ids[:, :: cases.STRIDE] > 0
    diff = np.abs(logits[:, :: cases.STRIDE] - references[name])[real]
    assert references[name][real].std() > 0.3  # else the bound would mean little
    assert diff.max() <= BOUND


@pytest.mark.parametrize("name", ["qwen2_tied_yarn", "qwen3_untied_yarn", "llama3", "llama_linear"])
def test_rope_scaling_matters_in_the_recorded_cases(name, load, references):
    model, params = load(name)
    plain = Decoder(dataclasses.replace(model.config, rope_scaling=None))
    logits = np.asarray(logits_of(plain, params, *cases.rows()))
    assert np.abs(logits[0, :: cases.STRIDE] - references[name][0]).max() > 100 * BOUND


@pytest.mark.parametrize("name", cases.ROPE_CASES)
def test_rope_frequencies_of_published_models(name, references):
    frequencies, factor = rope_frequencies(ModelConfig.from_hf(cases.ROPE_CASES[name]))
    expected = references[f"rope/{name}"]
    np.testing.assert_allclose(frequencies, expected[:-1], rtol=1e-6)
    assert factor == pytest.approx(expected[-1], rel=1e-6)


def test_padding_tokens_change_nothing(load):
    model, params = load("qwen3_tied")
    tokens, positions, ids = cases.rows()
    junk = np.where(ids > 0, tokens, 5)
    real = ids > 0
    a = np.asarray(logits_of(model, params, tokens, positions, ids))
    b = np.asarray(logits_of(model, params, junk, np.where(real, positions, 9), ids))
    np.testing.assert_array_equal(a[real], b[real])
    assert np.isfinite(a).all()


def test_a_row_of_padding_gives_finite_gradients(tiny):
    model, params = tiny
    zeros = jnp.zeros((2, 8), jnp.int32)
    grads = jax.jit(jax.grad(lambda p: model.apply(p, zeros, zeros, zeros).sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("qwen2", jnp.float32), ("qwen3_untied_yarn", jnp.float32), ("qwen2", jnp.bfloat16)],
)
def test_prefill_and_decode_equal_the_full_forward(name, dtype, load):
    """Rows of unequal length, right-padded; the second half of the tokens in a second chunk."""
    model, params = load(name)
    model = dataclasses.replace(model, dtype=dtype)
    rows, s, t, half = 3, 12, 6, 3
    rng = np.random.default_rng(3)
    lengths = np.array([s, 5, 8])
    real = np.arange(s) < lengths[:, None]
    prompts = np.where(real, rng.integers(1, cases.VOCAB, (rows, s)), 0)
    positions = np.broadcast_to(np.arange(s), (rows, s))
    tokens = rng.integers(1, cases.VOCAB, (rows, t))

    hidden, prompt = jax.jit(model.prefill)(params, prompts, positions, real.astype(int))
    c = model.config
    assert prompt.k.shape == (c.num_layers, rows, c.num_kv_heads, c.head_dim, s)
    assert prompt.v.shape == (c.num_layers, rows, c.num_kv_heads, s, c.head_dim)
    weights = jax.jit(model.unstack)(params)
    decode = jax.jit(model.decode)
    cache = model.new_cache(rows, s + t)
    cache = [
        KVCache(old.k.at[..., :s].set(prompt.k[y]), old.v.at[:, :, :s].set(prompt.v[y]))
        for y, old in enumerate(cache)
    ]
    filled, decoded = lengths, []
    for _ in range(2):
        recent, rope = model.new_cache(rows, half), model.angles(filled, half)
        for j in range(half):
            new = tokens[:, len(decoded)]
            logits, recent = decode(weights, new, rope, cache, filled, recent, j)
            decoded.append(logits)
        cache = [join_recent(*layer, filled) for layer in zip(cache, recent, strict=True)]
        filled = filled + half
    decoded = np.stack(decoded, axis=1)

    whole = np.zeros((rows, s + t), int)
    for row, n in enumerate(lengths):
        whole[row, : n + t] = [*prompts[row, :n], *tokens[row]]
    ids = (np.arange(s + t) < lengths[:, None] + t).astype(int)
    after = lengths[:, None] + np.arange(t)

    def full(model):
        places = np.broadcast_to(np.arange(s + t), whole.shape)
        return np.asarray(logits_of(model, params, whole, places, ids))

    wanted = np.take_along_axis(full(model), after[..., None], axis=1)
    if dtype == jnp.bfloat16:  # as far from the exact result as the full forward is, no more
        exact = full(dataclasses.replace(model, dtype=jnp.float32))
        exact = np.take_along_axis(exact, after[..., None], axis=1)
        error, usual = (np.square(x - exact).mean() ** 0.5 for x in (decoded, wanted))
        assert 1e-3 < error < 1.2 * usual
        return
    assert np.abs(decoded - wanted).max() <= BOUND
    prefilled = np.asarray(model.logits(params, hidden))
    assert np.abs(prefilled[real] - full(model)[:, :s][real]).max() <= BOUND


def test_decode_reads_no_unwritten_column(tiny):
    model, params = tiny
    weights, lengths = model.unstack(params), jnp.array([2, 0])
    step = jax.jit(model.decode)
    results = []
    for junk in (0.0, 7.0):
        cache, recent = model.new_cache(2, 8), model.new_cache(2, 4)
        used = jnp.arange(8)[None, :] < lengths[:, None]
        filled = KVCache(used[:, None, None, :], used[:, None, :, None])
        cache = [
            jax.tree.map(lambda c, f, x=junk: c + jnp.where(f, 1.0, x), layer, filled)
            for layer in cache
        ]
        recent = jax.tree.map(lambda c, x=junk: c + x, recent)
        rope = model.angles(lengths, 4)
        results.append(step(weights, jnp.array([3, 4]), rope, cache, lengths, recent, 0)[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("length", [16, 21])
def test_blocks_of_queries_equal_whole_rows(length, monkeypatch):
    shape = (2, length, 2, 8)
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))
    q = jnp.concatenate([q, -q], axis=2)
    ids = jnp.array([[1] * 9 + [2] * (length - 9), [0] * 4 + [3] * (length - 4)])

    def run() -> tuple[str, jax.Array]:
        def both(q, k, v):  # anew each time: the block size is no argument that jit would see
            weights = jnp.broadcast_to(jnp.where(ids > 0, 1.0, 0.0)[..., None, None], q.shape)
            return (attention.attend(q, k, v, ids) * weights * q).sum()

        lowered = jax.jit(jax.value_and_grad(both, argnums=(0, 1, 2))).lower(q, k, v)
        return lowered.as_text(), lowered.compile()(q, k, v)

    text, whole = run()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    text_of_blocks, blocks = run()
    assert text_of_blocks.count("stablehlo.while") > text.count("stablehlo.while")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, blocks)


def test_program_does_not_grow_with_depth():
    def lines(layers: int) -> int:
        model = Decoder(dataclasses.replace(TINY, num_layers=layers))
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        grad = jax.grad(lambda p, *xs: model.apply(p, *xs).sum())
        text = jax.jit(grad).lower(model.shapes(), tokens, tokens, tokens).as_text()
        return len(text.splitlines())

    assert lines(2) == lines(8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_parameters_follow_the_partition_table(family, tied):
    config = dataclasses.replace(
        TINY,
        model_type=family,
        tie_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    leaves = jax.tree_util.tree_leaves_with_path(Decoder(config).shapes())
    for path, leaf in leaves:
        assert len(param_spec(path_name(path))) == leaf.ndim
        assert leaf.dtype == jnp.float32
    assert len(leaves) == 11 + (3 if family == "qwen2" else 2 if family == "qwen3" else 0) + (
        not tied
    )


def test_init_is_scaled_and_differs_between_layers(tiny):
    _, params = tiny
    layers = params["layers"]
    q, down = layers["attn"]["q_proj"]["kernel"], layers["mlp"]["down_proj"]["kernel"]
    assert float(q.std()) == pytest.approx(16**-0.5, rel=0.1)
    assert float(down.std()) == pytest.approx((24 * 2 * 2) ** -0.5, rel=0.1)
    assert abs(float(jnp.corrcoef(q[0].ravel(), q[1].ravel())[0, 1])) < 0.15
    np.testing.assert_array_equal(params["final_norm"]["scale"], 1.0)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_bf16_computes_products_in_bf16_and_the_rest_in_fp32(load):
    model, params = load("qwen3_tied")
    half = Decoder(model.config, dtype=jnp.bfloat16)
    rows = cases.rows()
    jaxpr = jax.make_jaxpr(lambda p, *xs: half.logits(p, half.apply(p, *xs)))(params, *rows)
    seen = list(_equations(jaxpr.jaxpr))
    for eqn in seen:
        if eqn.primitive.name in ("exp", "rsqrt", "cos", "reduce_sum", "reduce_max"):
            assert eqn.invars[0].aval.dtype == jnp.float32, eqn
        if eqn.primitive.name == "dot_general":
            assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}, eqn
    assert {"exp", "rsqrt", "dot_general"} <= {e.primitive.name for e in seen}

    assert jax.eval_shape(half.apply, params, *rows).dtype == jnp.bfloat16
    logits = logits_of(half, params, *rows)
    assert logits.dtype == jnp.float32
    real = rows[2] > 0
    error = np.abs(np.asarray(logits - logits_of(model, params, *rows)))[real]
    assert 1e-4 < error.max() < 0.5  # bf16 keeps 8 bits, and logits reach 5

    cast = half.cast(params)
    assert cast["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits, logits_of(half, cast, *rows))


def test_remat_changes_memory_and_not_gradients(load):
    model, params = load("qwen2")
    rows = cases.rows()
    results, saved = {}, {}
    for name in REMAT:
        one = Decoder(model.config, remat=name)
        grad = jax.jit(jax.grad(lambda p, one=one: jnp.square(one.apply(p, *rows)).sum())).lower(
            params
        )
        compiled = grad.compile()
        results[name] = compiled(params)
        saved[name] = compiled.memory_analysis().temp_size_in_bytes
    assert saved["full"] < saved["dots"] < saved["none"]
    for name in ("full", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            results["none"],
            results[name],
        )


def test_a_decoder_is_a_static_argument():
    assert Decoder(TINY, dtype=jnp.bfloat16) == Decoder(TINY, dtype="bfloat16")
    assert hash(Decoder(TINY)) == hash(Decoder(dataclasses.replace(TINY)))
    with pytest.raises(UserError, match=r"remat: 'dot' found.*nearest: dots"):
        Decoder(TINY, remat="dot")


@pytest.mark.parametrize("name", cases.CASES)
def test_config_round_trip(name):
    config = ModelConfig.from_hf(cases.CASES[name])
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    newer = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    newer["rope_parameters"] = scaling | {"rope_theta": written["rope_theta"]}
    assert ModelConfig.from_hf(newer) == config


def test_config_defaults_are_those_of_transformers():
    c = ModelConfig.from_hf(
        {
            k: v
            for k, v in cases.CASES["qwen3_tied"].items()
            if k not in ("head_dim", "rms_norm_eps")
        }
    )
    assert (c.head_dim, c.norm_eps, c.qk_norm, c.qkv_bias) == (128, 1e-6, True, False)
    c = ModelConfig.from_hf(
        {
            k: v
            for k, v in cases.CASES["llama_tied"].items()
            if k not in ("num_key_value_heads", "tie_word_embeddings", "rope_theta")
        }
    )
    assert (c.head_dim, c.num_kv_heads, c.tie_embeddings, c.rope_theta) == (12, 4, False, 10000.0)


def test_yarn_factor_is_derived_when_absent():
    config = cases.CASES["qwen2"] | {
        "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}
    }
    assert ModelConfig.from_hf(config).rope_scaling == RopeScaling("yarn", 4.0, 64)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: true found"),
        ("qwen3_tied", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3_tied", {"attention_bias": True}, "attention_bias: true found"),
        ("llama_tied", {"attention_bias": True}, "attention_bias: true found"),
        ("llama_tied", {"mlp_bias": True}, "mlp_bias: true found"),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act: gelu found; supported: silu"),
        ("llama_tied", {"architectures": ["LlamaForTokenClassification"]}, "architectures: "),
        ("qwen2", {"model_type": "qwen2_moe"}, "model_type: qwen2_moe found.*nearest: qwen2"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: dynamic"),
        ("qwen2", {"rope_scaling": {"type": "longrope"}}, "rope_type: longrope found"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3"}}, "factor: missing;.*low_freq_factor"),
        ("qwen3_tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 found"),
        ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config: awq"),
        ("qwen2", {"num_hidden_layers": None}, "num_hidden_layers: None found"),
        ("qwen2", {"num_key_value_heads": 3}, "num_kv_heads: 3 found; must divide num_heads=4"),
        ("qwen3_tied", {"head_dim": 5}, "head_dim: 5 found"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, change, message):
    with pytest.raises(UserError, match=message) as error:
        ModelConfig.from_hf(cases.CASES[name] | change, source="here/config.json")
    assert all(p.startswith("here/config.json: ") for p in error.value.problems)


def test_all_problems_of_a_config_are_listed_at_once():
    bad = {"use_sliding_window": True, "hidden_act": "relu", "rope_scaling": {"type": "longrope"}}
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(cases.CASES["qwen2"] | bad | {"vocab_size": None})
    assert len(error.value.problems) == 4


def test_switches_must_fit_the_model_type():
    with pytest.raises(UserError, match="qk_norm: True found; model_type 'llama'"):
        dataclasses.replace(TINY, model_type="llama")
