"""Sampling from the policy."""

from kdrl_jax.rollout.engine import Finished, RolloutEngine, request_keys, sampling_params

__all__ = ["Finished", "RolloutEngine", "request_keys", "sampling_params"]
