"""Sampling from the policy."""

from kdrl_jax.rollout.engine import RolloutEngine, request_keys, sampling_params

__all__ = ["RolloutEngine", "request_keys", "sampling_params"]
