"""What a model takes of each device of a mesh: weights, caches, activations, logits, in bytes.

Numbers follow from shapes alone. `tests/test_memory.py` compares sums of them with XLA's account.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax.models import ModelConfig
from kdrl_jax.models.attention import QUERY_BLOCK, SPANS
from kdrl_jax.models.lora import LoRA
from kdrl_jax.sharding import batch_parts

F32 = 4
"""Bytes of a float32."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on a mesh.

    Attributes:
      width: bytes of a number of the compute dtype.
      small: whether frozen weights of the layers are kept in 8 bits.
      on_cpu: XLA multiplies bf16 in float32 there, so that what products read and write is
        converted, and it holds the attention scores of all spans of a row at once.
      lora: of the adapters, beside which nothing is trained.
    """

    shape: ModelConfig
    width: int
    small: bool
    batch: int
    fsdp: int
    tensor: int
    context: int
    on_cpu: bool
    lora: LoRA | None = None

    @classmethod
    def on(
        cls, mesh: Mesh, shape: ModelConfig, dtype: str, on_cpu: bool, lora: LoRA | None = None
    ) -> Placed:
        """`shape` on `mesh`, with the `dtype` of its role."""
        sizes, small = mesh.shape, dtype == "int8"
        width = jnp.dtype("bfloat16" if small else dtype).itemsize
        fsdp, tensor, context = (sizes[axis] for axis in ("fsdp", "tensor", "context"))
        return cls(shape, width, small, batch_parts(mesh), fsdp, tensor, context, on_cpu, lora)

    @property
    def acts(self) -> int:
        """Bytes of a number that products read and write."""
        return F32 if self.on_cpu else self.width

    def rows(self, count: int) -> float:
        """Rows on one device; all of them where the mesh does not divide them."""
        return count if count % self.batch else count / self.batch

    def stored(self, width: float) -> float:
        """All weights at `width` bytes, in their shards."""
        return self.shape.num_params * width / (self.fsdp * self.tensor)

    def frozen(self) -> float:
        """All weights of a model that is not trained, in their shards."""
        saved = self.shape.num_layers * self.shape.layer_matrices * (self.width - 1)
        return self.stored(self.width) - self.small * saved / (self.fsdp * self.tensor)

    def adapters(self, width: float, fsdp: int) -> float:
        """Adapters at `width` bytes, where `fsdp` devices share those that lie along the width."""
        if self.lora is None:
            return 0.0
        found = 0.0
        for name, (of_a, of_b) in self.lora.sizes(self.shape).items():
            along, across = (of_b, of_a) if name in ("o_proj", "down_proj") else (of_a, of_b)
            found += along / fsdp + across / self.tensor
        return found * width

    def learner(self) -> float:
        """The weights of a student, in their shards: float32 where they are trained."""
        if self.lora is None:
            return self.stored(F32)
        return self.frozen() + self.trained()

    def trained(self) -> float:
        """What has a gradient, or that gradient: float32 in its shards."""
        return self.stored(F32) if self.lora is None else self.adapters(F32, self.fsdp)

    @property
    def held(self) -> int:
        """Bytes of a number of the weights that a student's products read."""
        return F32 if self.lora is None else self.width

    def moments(self) -> float:
        """AdamW's two, which `data` and `context` split as well."""
        if self.lora is not None:
            return 2 * self.adapters(F32, self.batch * self.context)
        return self.shape.num_params * 2 * F32 / (self.batch * self.context * self.tensor)

    def whole(self, width: float) -> float:
        """All weights at `width` bytes, gathered over fsdp."""
        return self.shape.num_params * width / self.tensor

    def unstacked(self) -> float:
        """The copy of the weights that tokens are drawn with; see `Decoder.unstack`."""
        beside = self.adapters(self.width, 1) if self.width < F32 else 0.0
        return self.whole(self.width) + beside

    def table(self, width: float) -> float:
        """[V, D] at `width` bytes, gathered over fsdp."""
        c = self.shape
        return c.vocab_size * c.hidden_size * width / self.tensor

    def gathered(self) -> float:
        """The table and one layer as products use them, where fsdp shares them out."""
        layer = self.shape.layer_matrices * self.held / self.tensor
        return self.table(self.held) + 2 * layer if self.fsdp > 1 else 0.0

    def cache(self, slots: int, columns: int) -> float:
        """Keys and values of all layers."""
        c = self.shape
        column = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.width / self.tensor
        return self.rows(slots) * columns * column

    def kept(self, remat: str, length: int) -> float:
        """Bytes that the forward pass keeps of each token and layer for the backward pass."""
        c, a, t = self.shape, self.acts, self.tensor
        d, f = c.hidden_size, c.mlp_size / t
        q, kv = c.num_heads * c.head_dim / t, c.num_kv_heads * c.head_dim / t
        if remat == "full":  # what goes into the layer
            return a * d
        if remat == "dots":  # and what the projections give, but for the last one
            return a * (2 * d + q + 2 * kv + 2 * f)
        # Two norms of four float32 arrays each; the inputs of q, k, v, gate and up, of o and down;
        # five arrays within silu(gate) · up; the keys, values and queries of the attention.
        found = F32 * 8 * d + a * (5 * d + q + 6 * f) + a * (2 * kv + q)
        found += F32 * 4 * (q + kv) * c.qk_norm
        if length <= QUERY_BLOCK:  # scores, and the sum before it is divided
            found += c.num_heads / t * length * (F32 + a) + F32 * q
        return found

    def scores(self, rows: float, length: int) -> float:
        """Attention scores where rows are long: of a block of queries against the keys so far."""
        if length <= QUERY_BLOCK:
            return 0.0
        heads = self.shape.num_heads / self.tensor
        block = rows * heads * QUERY_BLOCK * length
        spans = min(SPANS, math.ceil(length / QUERY_BLOCK))
        at_once = (spans + 1) / 2 if self.on_cpu else 1
        return block * (F32 * at_once + self.acts)

    def forward(self, rows: float, length: int) -> float:
        """The working set of one layer, forwards, and the residual stream."""
        c, a, t = self.shape, self.acts, self.tensor
        attention = a * 2 * (c.num_heads + c.num_kv_heads) * c.head_dim / t
        if length <= QUERY_BLOCK:
            attention += c.num_heads / t * length * (F32 + a)
        per_token = (2 * a + F32) * c.hidden_size + max(attention, 3 * a * c.mlp_size / t)
        found = rows * length / self.context * per_token + self.keys(rows, length)
        return found + self.scores(rows, length) + self.gathered()

    def backward(self, rows: float, length: int) -> float:
        """The working set of one layer, backwards: all that it may keep, made again."""
        kept = rows * length / self.context * self.kept("none", length)
        return kept + self.keys(rows, length) + self.scores(rows, length)

    def keys(self, rows: float, length: int) -> float:
        """Keys and values of whole rows, gathered where `context` shares the length."""
        heads = self.shape.num_kv_heads * self.shape.head_dim / self.tensor
        return 2 * rows * length * heads * self.acts if self.context > 1 else 0.0

    def logits(self, rows: float, length: int, chunk: int) -> float:
        """One array of a chunk's logits; see `make_plan` in the objectives."""
        part = math.ceil(length / self.context)
        chunks = max(1, math.ceil(part / max(1, int(chunk // max(1, rows)))))
        vocab = self.shape.vocab_size
        return F32 * rows * math.ceil(part / chunks) * vocab / self.tensor
