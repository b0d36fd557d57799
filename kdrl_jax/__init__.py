"""kdrl_jax: reinforcement learning with knowledge distillation for language models, in JAX."""

import os

__version__ = "0.1.0"

if os.environ.get("KDRL_DEBUG") == "1":  # the shapes of every call are checked
    from kdrl_jax import shapes

    shapes.install()

if os.environ.get("KDRL_OFFLINE") == "1":  # the child of a process that is offline
    from kdrl_jax import network as network
