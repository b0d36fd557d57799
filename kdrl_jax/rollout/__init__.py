"""Sampling from the policy."""

from kdrl_jax.rollout.call import Finished
from kdrl_jax.rollout.engine import RolloutEngine
from kdrl_jax.rollout.requests import request_keys, sampling_params

__all__ = ["Finished", "RolloutEngine", "request_keys", "sampling_params"]
