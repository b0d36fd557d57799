"""kdrl_jax: reinforcement learning with knowledge distillation for language models, in JAX.

    import kdrl_jax

    result = kdrl_jax.train("demo", "runs/demo")

The functions are those of `kdrl_jax.api`, which is loaded when one of them is used.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdrl_jax import versions

if TYPE_CHECKING:
    from kdrl_jax.api import chat, evaluate, export, generate, load_config, plan, train
    from kdrl_jax.types import UserError

__version__ = "0.1.0"

if versions.run_as_command():  # before jax is imported, which a wrong jaxlib stops
    versions.require_packages()

if os.environ.get("KDRL_DEBUG") == "1":  # the shapes of every call are checked
    from kdrl_jax import shapes

    shapes.install()

if os.environ.get("KDRL_OFFLINE") == "1":  # the child of a process that is offline
    from kdrl_jax import network as network


COMMANDS = ("evaluate", "generate", "plan", "train")
"""Functions whose names are those of modules, the commands."""

__all__ = [
    "UserError",
    "chat",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "plan",
    "train",
]


class _Command(ModuleType):
    """A command's module, which is called as the function of its name: `kdrl_jax.train(…)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(_function(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMMANDS and isinstance(value, ModuleType):
            value.__class__ = _Command  # the import of a submodule ends here
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _function(name: str) -> Any:
    return getattr(importlib.import_module("kdrl_jax.api"), name)


def __getattr__(name: str) -> Any:
    if name in COMMANDS:
        return importlib.import_module(f"kdrl_jax.{name}")
    if name in __all__:
        return _function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
