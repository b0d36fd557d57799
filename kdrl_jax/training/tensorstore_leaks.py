"""Ways around objects that TensorStore never frees.

What it turns from JSON into Python objects keeps a reference too many (seen in 0.1.78 to 0.1.86).
Orbax asks for such objects with every array it saves: 30 kB a checkpoint of 40 arrays, scattered
over pages that then cannot be given back.
"""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import tensorstore


def avoid() -> None:
    """Have this process ask TensorStore for JSON no more often than it must. May be repeated."""
    # Read for a log alone, which is off.
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []
    spec = tensorstore.KvStore.Spec
    if spec.to_json is not _to_json:
        _originals["to_json"] = spec.to_json
        spec.to_json = _to_json  # type: ignore[method-assign]


_originals: dict[str, Any] = {}


def _to_json(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`tensorstore.KvStore.Spec.to_json`, asked once for equal specs: all arrays of a save."""
    return copy.deepcopy(_asked(pickle.dumps(self), args, tuple(sorted(kwargs.items()))))


@functools.lru_cache(maxsize=64)
def _asked(spec: bytes, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
    return _originals["to_json"](pickle.loads(spec), *args, **dict(kwargs))
