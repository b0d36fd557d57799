"""Sampling from the policy."""

from kdrl_jax.rollout.call import DecodeStats, Drawn, Finished, finished_requests
from kdrl_jax.rollout.engine import RolloutEngine
from kdrl_jax.rollout.interface import Engine
from kdrl_jax.rollout.requests import DRAWING, request_keys, sampling_params
from kdrl_jax.rollout.server import ServerEngine

__all__ = [
    "DRAWING",
    "DecodeStats",
    "Drawn",
    "Engine",
    "Finished",
    "RolloutEngine",
    "ServerEngine",
    "finished_requests",
    "request_keys",
    "sampling_params",
]
