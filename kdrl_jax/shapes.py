"""Holding every annotated function of the package to its shapes, in debug mode and in the tests.

jaxtyping's import hook wraps all functions and dataclasses of modules that are imported after it;
beartype compares what they are given and give back. An axis letter means one size within a call.
What has no shape (None, numbers, the placeholders of tree transformations) passes, host arrays
pass where devices' are declared, and hints that name no array are not looked at: mypy reads them.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

VARIABLE = "KDRL_DEBUG"
"""Set to 1 before the package is imported: its functions are checked."""


class _Unshaped(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return not hasattr(value, "shape")


class Unshaped(metaclass=_Unshaped):
    """Anything that has no shape."""


def install() -> None:
    """Check the modules of this package that are imported from here on.

    Raises:
      UserError: beartype is not installed.
    """
    try:
        import beartype  # noqa: F401
        from jaxtyping import install_import_hook
    except ImportError as error:
        from kdrl_jax.types import UserError  # not above: its records are to be checked, too

        raise UserError(
            "debug: True needs beartype, which checks shapes; pip install 'kdrl_jax[debug]'"
        ) from error
    install_import_hook("kdrl_jax", "kdrl_jax.shapes.checked")


def require_installed(argv: list[str] | None) -> None:
    """Start this command again with the checks in place, unless they are: it does not return.

    The modules that are to be checked have been imported by the time a config has been read.

    Args:
      argv: the command's arguments; None: those of the process. A caller that gives its own, in a
        program of its own, sets KDRL_DEBUG=1 itself.
    """
    if os.environ.get(VARIABLE) == "1" or argv is not None:
        return
    install()  # says what is missing, if anything is
    os.environ[VARIABLE] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker that jaxtyping is given: beartype, for what has a shape."""
    from beartype import beartype

    hints = {name: loosened(hint) for name, hint in function.__annotations__.items()}
    function.__annotations__ = {k: v for k, v in hints.items() if v is not Any}
    return beartype(function) if function.__annotations__ else function


def loosened(hint: Any) -> Any:
    """A hint about arrays that lets pass what has no shape; Any for one about something else."""
    from jaxtyping import AbstractArray

    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        # The same shape and dtype, in an array of any library.
        return typing.Union[hint.dtype[Any, hint.dim_str], Unshaped]  # noqa: UP007
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin not in (typing.Union, types.UnionType, tuple):
        return Any
    found = [loosened(part) if part is not Ellipsis else part for part in parts]
    if all(part in (Any, Ellipsis) for part in found):
        return Any
    if origin is tuple:
        return tuple[tuple(found)]  # type: ignore[misc]
    if any(has is Any and hasattr(part, "shape") for has, part in zip(found, parts, strict=True)):
        return Any  # an array of any shape is one of the alternatives
    return functools.reduce(operator.or_, (part for part in found if part is not Any))
