"""Ways around objects that TensorStore never frees.

What it turns from JSON into Python objects keeps a reference too many (seen in 0.1.78 to 0.1.86).
Orbax asks for such objects with every array it saves: 30 kB a checkpoint of 40 arrays, scattered
over pages that then cannot be given back.
"""

from __future__ import annotations

import collections
import copy
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
_Answer = tuple[Any, tuple[Any, ...], dict[str, Any], Any]
_answers: collections.deque[_Answer] = collections.deque(maxlen=8)
"""(spec, positional and named arguments, what came of them): the last ones, of a few folders."""


def _to_json(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`tensorstore.KvStore.Spec.to_json`, asked once for equal specs: all arrays of a save."""
    for spec, *given, found in list(_answers):
        if given == [args, kwargs] and spec == self:
            return copy.deepcopy(found)
    found = _originals["to_json"](self, *args, **kwargs)
    _answers.append((self, args, kwargs, found))
    return copy.deepcopy(found)
