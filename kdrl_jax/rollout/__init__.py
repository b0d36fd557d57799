"""Sampling from the policy."""

from kdrl_jax.rollout.call import DecodeStats, Finished, finished_requests
from kdrl_jax.rollout.engine import RolloutEngine
from kdrl_jax.rollout.requests import request_keys, sampling_params

__all__ = [
    "DecodeStats",
    "Finished",
    "RolloutEngine",
    "finished_requests",
    "request_keys",
    "sampling_params",
]
