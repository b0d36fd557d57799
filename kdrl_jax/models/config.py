"""The shape of a decoder, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from kdrl_jax.types import UserError


class Family(NamedTuple):
    """What a `model_type` fixes without saying it in its config.json."""

    architecture: str
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None
    """Used if config.json names none; None means hidden_size / num_heads."""
    norm_eps: float
    num_kv_heads: int | None
    """Used if config.json names none; None means num_heads."""
    max_positions: int


FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", True, False, None, 1e-6, 32, 32768),
    "qwen3": Family("Qwen3ForCausalLM", False, True, 128, 1e-6, 32, 32768),
    "llama": Family("LlamaForCausalLM", False, False, None, 1e-6, None, 2048),
}

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched for contexts longer than those trained on.

    The fields are those of `rope_scaling` in config.json; which of them count depends on `kind`.
    """

    kind: str
    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / low_freq_factor are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / high_freq_factor are left alone."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched fully."""
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None derives it from factor, mscale and mscale_all_dim."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: round the bounds of the ramp outwards to whole dimensions."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Qwen2, Qwen3 or Llama decoder.

    Raises:
      UserError: sizes that cannot go together, or switches that the `model_type` does not have.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = True
    max_positions: int = 32768
    model_type: str = "qwen3"

    def __post_init__(self) -> None:
        problems = []
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: {getattr(self, name)} found; must be at least 1")
        if self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_kv_heads: {self.num_kv_heads} found; must divide num_heads={self.num_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            problems.append(f"head_dim: {self.head_dim} found; RoPE needs an even number")
        family = FAMILIES.get(self.model_type)
        if family is None:
            problems.append(_unsupported("model_type", self.model_type, tuple(FAMILIES)))
        else:
            for name in ("qkv_bias", "qk_norm"):
                if getattr(self, name) != getattr(family, name):
                    problems.append(
                        f"{name}: {getattr(self, name)} found; model_type "
                        f"{self.model_type!r} has {name}={getattr(family, name)}"
                    )
        if self.rope_scaling is not None and self.rope_scaling.kind not in ROPE_KINDS[1:]:
            problems.append(
                _unsupported("rope_scaling.kind", self.rope_scaling.kind, ROPE_KINDS[1:])
            )
        if problems:
            raise UserError(*problems)

    @property
    def layer_matrices(self) -> int:
        """Numbers in the matrices of one layer: what a token is multiplied with."""
        d, h = self.hidden_size, self.head_dim
        return 2 * d * h * (self.num_heads + self.num_kv_heads) + 3 * d * self.mlp_size

    @property
    def num_params(self) -> int:
        """Numbers in all weights."""
        d, h = self.hidden_size, self.head_dim
        layer = self.layer_matrices + 2 * d
        layer += h * (self.num_heads + 2 * self.num_kv_heads) * self.qkv_bias + 2 * h * self.qk_norm
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + d

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """The config that `config`, the contents of a config.json, describes.

        Reads both the older keys (`rope_theta`, `rope_scaling`) and the newer `rope_parameters`.

        Args:
          config: the parsed JSON object.
          source: what to call it in error messages.

        Raises:
          UserError: keys are missing, or ask for something that this decoder does not do; all of
            them at once, one line each.
        """
        problems: list[str] = []
        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            problems.append(_unsupported("model_type", config.get("model_type"), tuple(FAMILIES)))
            family = FAMILIES["llama"]  # so that the other keys are checked as well
        else:
            problems += _refused_features(config, family)
        for key in REQUIRED:
            if not isinstance(config.get(key), int):
                problems.append(f"{key}: {config.get(key)} found; must be a whole number")
        rope_theta, rope_scaling = _read_rope(config, family, problems)
        if problems:
            raise UserError(*(f"{source}: {p}" for p in problems))

        heads = config["num_attention_heads"]
        head_dim = _first(config.get("head_dim"), family.head_dim, config["hidden_size"] // heads)
        try:
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=_first(config.get("num_key_value_heads"), family.num_kv_heads, heads),
                head_dim=head_dim,
                mlp_size=config["intermediate_size"],
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                norm_eps=float(config.get("rms_norm_eps", family.norm_eps)),
                qkv_bias=family.qkv_bias,
                qk_norm=family.qk_norm,
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                max_positions=config.get("max_position_embeddings", family.max_positions),
                model_type=config["model_type"],
            )
        except UserError as error:
            raise UserError(*(f"{source}: {p}" for p in error.problems)) from None

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that `transformers` (4 and 5) and `from_hf` read back."""
        config: dict[str, Any] = {
            "architectures": [FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": _write_scaling(self.rope_scaling),
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if self.model_type == "llama":
            config |= {"attention_bias": False, "mlp_bias": False}
        else:
            config |= {"use_sliding_window": False}
        if self.model_type == "qwen3":
            config |= {"attention_bias": False}
        return config


def _refused_features(config: Mapping[str, Any], family: Family) -> list[str]:
    """One line for each feature that `config` switches on and this decoder does not have."""
    problems = []
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        problems.append(_unsupported("architectures", architectures, (family.architecture,)))
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        problems.append(_unsupported("hidden_act", act, ("silu",)))
    biases = ("mlp_bias",) if family.qkv_bias else ("attention_bias", "mlp_bias")
    for key in biases:
        if config.get(key):
            problems.append(f"{key}: true found; only false is supported for this model_type")
    if config.get("use_sliding_window"):
        problems.append(
            "use_sliding_window: true found; sliding-window attention is not supported, "
            "use a checkpoint with full attention (false)"
        )
    kinds = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if kinds and not config.get("use_sliding_window"):
        problems.append(_unsupported("layer_types", ", ".join(kinds), ("full_attention",)))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "a quantisation")
        problems.append(
            f"quantization_config: {method} found; export unquantised weights and load those"
        )
    return problems


def _read_rope(
    config: Mapping[str, Any], family: Family, problems: list[str]
) -> tuple[float, RopeScaling | None]:
    """RoPE's theta and scaling from either form of config.json; appends to `problems`."""
    newer = config.get("rope_parameters") or {}
    section = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = config.get("rope_scaling") or newer
    theta = float(_first(rope.get("rope_theta"), config.get("rope_theta"), 10_000.0))

    partial = _first(rope.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0)
    if partial != 1.0:
        problems.append(f"partial_rotary_factor: {partial} found; only 1.0 is supported")
    kind = _first(rope.get("rope_type"), rope.get("type"), "default")
    if kind not in ROPE_KINDS:
        problems.append(_unsupported(f"{section}.rope_type", kind, ROPE_KINDS))
        return theta, None
    if kind == "default":
        return theta, None

    max_positions = config.get("max_position_embeddings", family.max_positions)
    original = _first(
        config.get("original_max_position_embeddings"),
        rope.get("original_max_position_embeddings"),
        max_positions,
    )
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_positions / original
    required = {"factor": factor}
    if kind == "llama3":
        required |= {k: rope.get(k) for k in ("low_freq_factor", "high_freq_factor")}
    missing = [key for key, value in required.items() if not isinstance(value, int | float)]
    if missing:
        problems += [f"{section}.{k}: missing; rope_type {kind!r} needs a number" for k in missing]
        return theta, None
    return theta, RopeScaling(
        kind=kind,
        factor=float(factor),  # type: ignore[arg-type]
        original_max_positions=int(original),
        low_freq_factor=float(_first(rope.get("low_freq_factor"), 1.0)),
        high_freq_factor=float(_first(rope.get("high_freq_factor"), 4.0)),
        # 0 counts as unset, as in transformers.
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=rope.get("attention_factor"),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        truncate=bool(_first(rope.get("truncate"), True)),
    )


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` as config.json has it: only the keys that its kind reads."""
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        out["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        out["low_freq_factor"] = scaling.low_freq_factor
        out["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        out |= {k: v for k in optional if (v := getattr(scaling, k)) is not None}
        out["truncate"] = scaling.truncate
    return out


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(v for v in values if v is not None)


def _unsupported(key: str, value: Any, supported: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), supported, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    return f"{key}: {value} found; supported: {', '.join(supported)}{hint}"
