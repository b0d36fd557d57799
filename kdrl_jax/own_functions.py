"""Functions of the user's own that are given in Python instead of named in a config.

A config holds texts. A function that any process can import is written 'module:function'. One of a
notebook, of the program that runs, or made within another function has no such name: it is written
'python:NAME' and is known to this process alone.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any

from kdrl_jax.types import UserError

HERE = "python"
_known: dict[tuple[str, str], Callable[..., Any]] = {}
"""By config key and name."""


def name_of(function: Callable[..., Any], key: str) -> str:
    """Returns the text that a config has for a function; `find_here` finds it again.

    Args:
      key: of the config, for errors.

    Raises:
      UserError: it is no function.
    """
    if not callable(function):
        raise UserError(f"{key}: {function!r} is no function; give one, or 'module:function'")
    name = getattr(function, "__qualname__", type(function).__name__)
    module = getattr(function, "__module__", None)
    if _is_importable(function, module, name):
        return f"{module}:{name}"
    short = name.rpartition(".")[2].replace("<lambda>", "function")
    _known[key, short] = function  # of a notebook's cell that is run again the newest is meant
    return f"{HERE}:{short}"


def find_here(key: str, name: str) -> Callable[..., Any]:
    """Returns the function that `name_of` wrote as 'python:NAME'.

    Raises:
      UserError: this process was given no such function.
    """
    try:
        return _known[key, name.partition(":")[2]]
    except KeyError:
        raise UserError(
            f"{key}: {name!r} is a function that was given in Python; give it again, or put it "
            "into a module and name that as 'module:function'"
        ) from None


def is_here(name: str) -> bool:
    """Whether a text names a function of this process."""
    return name.startswith(f"{HERE}:")


def source_digest(key: str, name: str) -> str:
    """Returns the SHA-256 of a function's source, or of its code where there is no source."""
    return hashlib.sha256(_code(find_here(key, name))).hexdigest()


def _is_importable(function: Callable[..., Any], module: Any, name: str) -> bool:
    """Whether another process finds the function by its module and name."""
    loaded = sys.modules.get(module) if isinstance(module, str) else None
    spec = getattr(loaded, "__spec__", None)
    if module == "__main__" or spec is None or not spec.has_location or "<" in name:
        return False
    try:
        return operator.attrgetter(name)(loaded) is function
    except AttributeError:
        return False


def _code(function: Callable[..., Any]) -> bytes:
    try:
        return inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return code.co_code + repr(code.co_consts).encode() if code else repr(function).encode()


class Caller:
    """Calls functions of this process with a time limit.

    A call runs in a thread of its own, which nothing can end: one that takes too long is left to
    itself, and the function is not called again before it has ended.

    Args:
      timeout_s: seconds of wall time for a call.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._running: dict[Callable[..., Any], threading.Thread] = {}

    def call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Returns what the function returns as a list of numbers and Nones, or in words what went
        wrong: 'timeout: …', or the exception's type and message.
        """
        before = self._running.get(function)
        if before is not None:
            before.join(self._timeout_s)
            if before.is_alive():
                return "timeout: "
        replies: list[Any] = []

        def work() -> None:
            try:
                values = function(**arguments)
                replies.append([None if value is None else float(value) for value in values])
            except BaseException as error:  # SystemExit too is the function's fault
                replies.append(f"{type(error).__name__}: {error}"[:1000])

        thread = threading.Thread(target=work, name="reward function", daemon=True)
        self._running[function] = thread
        thread.start()
        thread.join(self._timeout_s)
        return replies[0] if replies else "timeout: "
