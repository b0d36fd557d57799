"""The decoder: one layer defined with Flax NNX, stacked by `nnx.vmap`, run by `lax.scan`.

NNX says which parameters there are and how a layer computes; plain nested dicts of arrays, with
every layer's weights stacked on a leading axis, are what flows. Compile time does not grow with
depth, and one partition table (`kdrl_jax.sharding`) covers every model.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kdrl_jax.models.attention import attend
from kdrl_jax.models.config import ModelConfig
from kdrl_jax.models.context import context_length, context_parts, from_context, to_context
from kdrl_jax.models.decoding import DecodeWeights, decode_layer, fuse_layer
from kdrl_jax.models.int8 import dequantize
from kdrl_jax.models.kernels import pad_rows
from kdrl_jax.models.layers import (
    MLP,
    AttentionProjections,
    RMSNorm,
    einsum,
    rms_norm,
    rope_angles,
)
from kdrl_jax.models.lora import LoRA, split
from kdrl_jax.sharding import constrain, gathered, path_name
from kdrl_jax.types import KVCache, Params, UserError

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q, k, v of the new tokens) -> (weighted values, whatever the caller keeps of k and v)."""

# What the backward pass finds stored of each layer. 'dots' keeps the results of the projections
# (matrix products without a batch axis) and recomputes attention scores and elementwise work.
REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda f: f,
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "dots": functools.partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
}


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, lora: LoRA | None, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs)
        self.attn = AttentionProjections(config, lora, rngs=rngs)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs)
        self.mlp = MLP(config, lora, rngs=rngs)

    def __call__(
        self, x: Float[Array, "R L D"], rope: tuple[Array, Array], attend: Attend
    ) -> tuple[Float[Array, "R L D"], Any]:
        with jax.named_scope("attention"):
            out, kept = attend(*self.attn.qkv(self.input_norm(x), rope))
            out = constrain(out, "batch", "length", "heads", None)
            x = constrain(x + self.attn.o_proj(out), "batch", "length", "embed")
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.post_norm(x))
        return constrain(x, "batch", "length", "embed"), kept


class Embedding(nnx.Module):
    """Rows of a [V, D] table ~ N(0, 1/D)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Head(nnx.Module):
    """An output head of its own, stored [V, D] like the embedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        std = config.hidden_size**-0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Network(nnx.Module):
    """All parameters of a decoder; `layers` is one DecoderLayer with a leading layer axis."""

    def __init__(self, config: ModelConfig, lora: LoRA | None, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, lora, rngs=rngs)

        self.embed = Embedding(config, rngs=rngs)
        self.layers = stack(rngs)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs)


@functools.lru_cache(maxsize=64)
def _graph(module: Callable[..., nnx.Module], args: tuple[Any, ...]) -> Any:
    """The structure of `module(*args)` without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: module(*args, rngs=nnx.Rngs(0))))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model without its weights: hashable, so it can be a static argument of `jax.jit`.

    Args:
      config: sizes and switches.
      dtype: of activations and products; weights are cast to it as they are used. Softmax, norms
        and logits are fp32 whatever it is.
      remat: what backward recomputes, a key of REMAT.
      lora: of the adapters; its weights then have them beside the kernels. None: it has none.

    Raises:
      UserError: `remat` is not a known name.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.remat not in REMAT:
            near = difflib.get_close_matches(str(self.remat), REMAT, n=1, cutoff=0)
            raise UserError(
                f"remat: {self.remat!r} found; choose from {', '.join(REMAT)} (nearest: {near[0]})"
            )

    def init(self, key: Array) -> Params:
        """Random fp32 weights in the layout of `sharding.PARAM_RULES`.

        Matrices are N(0, 1/fan_in), divided by sqrt(2Y) where they write to the residual stream.
        Pure, so that `jax.jit(model.init, out_shardings=...)` never holds them unsharded.

        Args:
          key: a JAX random key.
        """
        network = Network(self.config, self.lora, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(network, nnx.Param))

    def init_trained(self, key: Array) -> Params:
        """What of `init` a run trains: the adapters where there are any, else all of it."""
        return split(self.init(key))[0] if self.lora else self.init(key)

    @property
    def base(self) -> Decoder:
        """The model without its adapters."""
        return dataclasses.replace(self, lora=None)

    def shapes(self) -> Params:
        """The tree that `init` returns, as shapes and dtypes."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def unstack(self, params: Params) -> DecodeWeights:
        """`params` as decoding reads them: layer by layer, in the compute dtype, whole on `fsdp`.

        Done once before many tokens instead of once a token: slicing a layer out of the stack,
        casting it, laying it out, and gathering it from the devices that share it.
        """
        c, params = self.config, self.cast(dequantize(params, self.dtype))
        layers = (jax.tree.map(lambda x, y=y: x[y], params["layers"]) for y in range(c.num_layers))
        embedding = constrain(params["embed"]["embedding"], "vocab", None)
        return DecodeWeights(
            embedding=embedding,
            layers=[fuse_layer(c, layer, self.lora) for layer in layers],
            final_norm=params["final_norm"]["scale"],
            head=None if c.tie_embeddings else constrain(self.head(params), "vocab", None),
        )

    def cast(self, params: Params) -> Params:
        """`params` in the compute dtype: to keep frozen weights in.

        Norm scales stay fp32: norms compute in it.
        """

        def one(path: Any, x: Array) -> Array:
            return x if path_name(path).endswith("/scale") else x.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "R L"],
        positions: Int[Array, "R L"],
        segment_ids: Int[Array, "R L"],
    ) -> Float[Array, "R L D"]:
        """Hidden states after the final norm, in the compute dtype.

        A token sees the earlier tokens of its row that carry its own segment id; id 0 is padding,
        where the output is meaningless but finite.

        Args:
          tokens: ids in [0, V).
          positions: RoPE positions, counted within each segment.
          segment_ids: 0 = padding; rows may pack several segments.
        """
        length, parts = tokens.shape[1], context_parts()
        if parts > 1:
            filled = context_length(length)
            tokens, positions, segment_ids = (
                pad_rows(x, filled) for x in (tokens, positions, segment_ids)
            )
            tokens, positions = (to_context(x, parts) for x in (tokens, positions))
        rope = rope_angles(self.config, positions)

        def look(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return attend(q, k, v, segment_ids), None

        def step(x: Array, weights: Params) -> tuple[Array, None]:
            return self._layer(weights, x, rope, look)

        x, _ = jax.lax.scan(REMAT[self.remat](step), self._embed(params, tokens), params["layers"])
        if parts > 1:
            x = from_context(x, parts)[:, :length]
        return self._final_norm(params, x)

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "P S"],
        positions: Int[Array, "P S"],
        segment_ids: Int[Array, "P S"],
    ) -> tuple[Float[Array, "P S D"], KVCache]:
        """`apply` on the prompts, which also returns the keys and values of all layers."""
        rope = rope_angles(self.config, positions)

        def look(q: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
            kept = KVCache(k=k.transpose(0, 2, 3, 1), v=v.transpose(0, 2, 1, 3))
            return attend(q, k, v, segment_ids), kept

        def step(x: Array, weights: Params) -> tuple[Array, KVCache]:
            return self._layer(weights, x, rope, look)

        x, cache = jax.lax.scan(step, self._embed(params, tokens), params["layers"])
        cache = jax.tree.map(lambda c: constrain(c, None, "batch", "kv_heads", None, None), cache)
        return self._final_norm(params, x), cache

    def new_cache(self, rows: int, window: int) -> list[KVCache]:
        """Empty caches of the layers, with W = `window`, in the compute dtype."""
        c = self.config

        def zeros(*last: int) -> Array:
            shape = (rows, c.num_kv_heads, *last)
            return constrain(jnp.zeros(shape, self.dtype), "batch", "kv_heads", None, None)

        h = c.head_dim
        return [KVCache(k=zeros(h, window), v=zeros(window, h)) for _ in range(c.num_layers)]

    def angles(self, lengths: Int[Array, " B"], steps: int) -> tuple[Array, Array]:
        """What `decode` rotates the next `steps` tokens of every row by, `[steps, B, 1, 1, H/2]`.

        Apart from `decode`, since a CPU's compiler would compute it again in every layer.
        """
        return rope_angles(self.config, (lengths[None, :] + jnp.arange(steps)[:, None])[:, :, None])

    def decode(
        self,
        weights: DecodeWeights,
        tokens: Int[Array, " B"],
        rope: tuple[Array, Array],
        cache: list[KVCache],
        lengths: Int[Array, " B"],
        recent: list[KVCache],
        index: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B V"], list[KVCache]]:
        """One token of every row: its fp32 logits, and `recent` with the token written in.

        Layers are unrolled, so that nothing is sliced out of a stack for each token.

        Args:
          weights: from `unstack`.
          tokens: the newest token of each row, at position lengths + index.
          rope: from `angles`.
          cache: of each layer; only read.
          lengths: columns of a row's cache that are filled.
          recent: of each layer: the tokens since, with columns below `index` filled.
          index: the column of `recent` to write, the same for every row.
        """
        rope = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), rope)
        x = jnp.take(weights.embedding, tokens, axis=0).astype(self.dtype)
        x = constrain(x, "batch", "embed")
        written = []
        for layer, old, new in zip(weights.layers, cache, recent, strict=True):
            x, new = decode_layer(self.config, layer, x, rope, old, lengths, new, index)
            written.append(new)
        x = rms_norm(x, weights.final_norm, self.config.norm_eps)
        # [V, D] as the left factor: a CPU's product is a quarter faster.
        head = weights.embedding if weights.head is None else weights.head
        return einsum("VD,BD->VB", head, x, jnp.float32).T, written

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The output head in the compute dtype: its own, or the embedding where tied."""
        tied = self.config.tie_embeddings
        table = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
        return table.astype(self.dtype)

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 scores of every vocabulary row.

        For long rows use `kdrl_jax.objectives.logprobs` instead, which never holds [R, L, V].
        """
        hidden = hidden.astype(self.dtype)
        return einsum("...D,VD->...V", hidden, self.head(params), jnp.float32)

    def _layer(self, weights: Params, x: Array, rope: tuple[Array, Array], attend: Attend) -> Any:
        # One layer at a time. Gathered by name, or a TPU's compiler would have the products wait
        # for one part of a weight after the other.
        weights = self.cast(dequantize(weights, self.dtype))
        weights = jax.tree_util.tree_map_with_path(
            lambda path, x: gathered(f"layers/{path_name(path)}", x), weights
        )
        layer = nnx.merge(_graph(DecoderLayer, (self.config, self.lora)), weights)
        return layer(x, rope, attend)

    def _embed(self, params: Params, tokens: Array) -> Array:
        # Gathered over `fsdp` first, as every weight is; the lookup then splits along the batch.
        table = constrain(params["embed"]["embedding"], "vocab", "embed")
        x = jnp.take(table, tokens, axis=0).astype(self.dtype)
        return constrain(x, "batch", "length", "embed")

    def _final_norm(self, params: Params, x: Array) -> Array:
        args = (self.config.hidden_size, self.config.norm_eps)
        return nnx.merge(_graph(RMSNorm, args), params["final_norm"])(x)
