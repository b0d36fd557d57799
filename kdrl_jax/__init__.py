"""kdrl_jax: reinforcement learning with knowledge distillation for language models, in JAX."""

import os

from kdrl_jax import versions

__version__ = "0.1.0"

if versions.run_as_command():  # before jax is imported, which a wrong jaxlib stops
    versions.require_packages()

if os.environ.get("KDRL_DEBUG") == "1":  # the shapes of every call are checked
    from kdrl_jax import shapes

    shapes.install()

if os.environ.get("KDRL_OFFLINE") == "1":  # the child of a process that is offline
    from kdrl_jax import network as network
