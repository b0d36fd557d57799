"""Rewards of the user's own: Python functions, named in a config, that add to the verifier's.

    # my_rewards.py
    def brevity(completions, lengths, **_):
        return [1 - length / 1000 for length in lengths]

    with RewardFunctions(("my_rewards:brevity*0.2",)) as functions:
        found = functions.ask([group, …])

A function is called once for the G completions of a problem, with those of ARGUMENTS that it takes,
all lists of length G, and returns G numbers. It runs in worker processes with a time limit, as a
task's verifier does (`supervisor`). A call that fails adds nothing to the rewards of its group: so
it favours none of the completions that are compared.
"""

from __future__ import annotations

import inspect
import json
import math
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kdrl_jax.config import load_attribute
from kdrl_jax.own_functions import Caller, find_here, is_here
from kdrl_jax.rewards.supervisor import Supervisor, kill_all, worker_command
from kdrl_jax.types import OUTCOMES, UserError

KEY = "reward.functions"
_MOST = float(np.finfo(np.float32).max)
ARGUMENTS = {
    "problems": "the problem's text, G times",
    "answers": "its gold answer, G times",
    "metas": "its other columns, a dict, G times",
    "completions": "texts without the end token",
    "verdicts": f"the verifier's: {', '.join(OUTCOMES)}",
    "lengths": "tokens, the end token included",
    "truncated": "whether the limit of tokens ended it",
}
"""What a function may take, by keyword; each a list of length G."""
TAKEN = ("mean", "drawn_mean", "equal_frac", "verdict", "all_right_frac", "all_wrong_frac")
RESERVED = frozenset({*TAKEN, *(f"{outcome}_frac" for outcome in OUTCOMES)})
"""Names that metrics `reward/NAME` have already."""

Group = Mapping[str, Sequence[Any]]
"""ARGUMENTS of the G completions of one problem."""


class RewardFunction(NamedTuple):
    """One of `reward.functions`."""

    target: str
    """'module:function'."""
    name: str
    """The function's own: its metric is `reward/NAME`."""
    weight: float
    takes: tuple[str, ...]
    """Those of ARGUMENTS that it is given."""


class OwnReward(NamedTuple):
    """What a function said of P groups."""

    values: Float[np.ndarray, "P G"]
    """Float32, before its weight; NaN where it has no opinion or failed."""
    failed: Float[np.ndarray, " P"]
    """1 where the call failed, else 0."""


def parse_functions(texts: Sequence[Any]) -> list[RewardFunction]:
    """`reward.functions`: 'module:function' or 'module:function*weight'. Imports the modules.

    Raises:
      UserError: one line for each that is not written so, cannot be imported, is not callable,
        asks for what there is not, or has the name of another.
    """
    found: list[RewardFunction] = []
    problems: list[str] = []
    for text in texts:
        try:
            function = _parse(text)
        except UserError as error:
            problems += error.problems
            continue
        same = [other.target for other in found if other.name == function.name]
        if same or function.name in RESERVED:
            whose = f"that of {same[0]}" if same else "a metric"
            problems.append(
                f"{KEY}: {text!r}: reward/{function.name} is {whose} already; rename the function"
            )
        found.append(function)
    if problems:
        raise UserError(*problems)
    return found


def _parse(text: Any) -> RewardFunction:
    target, star, number = str(text).partition("*")
    module, _, attribute = target.partition(":")
    try:
        weight = float(number) if star else 1.0
    except ValueError:
        weight = math.nan
    if not (isinstance(text, str) and module and attribute and math.isfinite(weight)):
        raise UserError(
            f"{KEY}: {text!r} is not 'module:function' or 'module:function*weight'; write "
            "('my_rewards:brevity*0.2',)"
        )
    function = load_attribute(KEY, target, callable, "functions")
    if not callable(function):
        raise UserError(f"{KEY}: {text!r}: {target} is no function but {function!r}; name another")
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [p.name for p in named if p.name not in ARGUMENTS and p.default is p.empty]
    unknown += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if unknown:
        raise UserError(
            f"{KEY}: {text!r} takes {', '.join(unknown)}; there are {', '.join(ARGUMENTS)}, by "
            "keyword" + _hint(unknown)
        )
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = tuple(ARGUMENTS) if every else tuple(p.name for p in named if p.name in ARGUMENTS)
    return RewardFunction(target, attribute.rpartition(".")[2], weight, takes)


def _hint(unknown: Sequence[str]) -> str:
    """Where other trainers' arguments are."""
    known = {"prompts": "problems", "prompt": "problems", "answer": "answers"}
    found = [f"{name} is {known[name]} here" for name in unknown if name in known]
    if len(found) < len(unknown):
        found.append("other columns of a row are in metas")
    return f"; {', '.join(found)}"


class RewardFunctions:
    """The reward functions of a run; a context manager that owns up to `workers` processes.

    Without functions it starts none, and the reward is the verdict's, times its weight.

    Args:
      texts: see `parse_functions`.
      verdict_weight: of the verifier's 0 or 1 in the reward.
      timeout_s: for one call, hand-over to reply. The module's import is not counted.

    Raises:
      UserError: see `parse_functions`.
    """

    def __init__(
        self,
        texts: Sequence[str] = (),
        verdict_weight: float = 1.0,
        *,
        workers: int = 4,
        timeout_s: float = 3.0,
    ):
        self.functions = parse_functions(texts)
        self._verdict_weight, self._timeout_s = verdict_weight, timeout_s
        # Functions of this process are called here, all others in the workers.
        self._here = Caller(timeout_s)
        targets = [f.target for f in self.functions if not is_here(f.target)]
        command = worker_command(timeout_s, ("reward", targets))
        self._supervisor = _Callers(command, workers, timeout_s, ", ".join(targets))
        self._said: set[tuple[str, str]] = set()
        self._worked = False
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, kill_all, self._supervisor.workers)

    def __enter__(self) -> RewardFunctions:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Asking again would start new ones."""
        with self._lock:
            kill_all(self._supervisor.workers)

    def ask(self, groups: Sequence[Group]) -> dict[str, OwnReward]:
        """What each function gives the completions of P problems, by its name.

        A function that raises, takes too long, ends its process or returns something else than G
        finite numbers (or None: no opinion) has failed for that group; the first failure of each
        kind is a RuntimeWarning.

        Raises:
          UserError: a meta that is not JSON, for a function that takes it; or every first call of
            every function has failed, and there is no other reward.
          RuntimeError: workers do not start.
        """
        elsewhere = [function for function in self.functions if not is_here(function.target)]
        requests = {
            (p, function.name): (str(i), _arguments(group, function))
            for i, function in enumerate(elsewhere)
            for p, group in enumerate(groups)
        }
        with self._lock:
            answers = self._supervisor.ask(dict.fromkeys(requests.values())) if requests else {}
        replies = {place: answers[request] for place, request in requests.items()}
        for function in [f for f in self.functions if is_here(f.target)]:
            own = find_here(KEY, function.target)
            for p, group in enumerate(groups):
                arguments = {name: list(group[name]) for name in function.takes}
                replies[p, function.name] = self._here.call(own, arguments)
        size = len(groups[0]["completions"]) if groups else 0
        found, faults = {}, []
        for function in self.functions:
            values = np.full((len(groups), size), np.nan, np.float32)
            failed = np.zeros(len(groups), np.float32)
            for p, group in enumerate(groups):
                reply = replies[p, function.name]
                kind, why = _fault(reply, size, self._timeout_s)
                if kind:
                    failed[p] = 1.0
                    faults.append(f"{KEY}: {function.target} {why}")
                    self._say(function, kind, why, group["problems"][0])
                else:
                    values[p] = [math.nan if value is None else value for value in reply]
            found[function.name] = OwnReward(values, failed)
        calls = len(groups) * len(self.functions)
        self._worked |= len(faults) < calls
        if calls and not self._worked and not self._verdict_weight:
            raise UserError(
                *(f"{line}; no call worked, so there is no reward; mend it" for line in set(faults))
            )
        return found

    def total(
        self, correct: Float[np.ndarray, "P G"], own: Mapping[str, OwnReward]
    ) -> Float[np.ndarray, "P G"]:
        """The reward: the verdict's and the functions' values, weighted and added; float32.

        Args:
          correct: 1 where the verifier says so, else 0.
          own: see `ask`; NaN adds nothing.
        """
        total = np.float32(self._verdict_weight) * correct
        for function in self.functions:
            total += np.float32(function.weight) * np.nan_to_num(own[function.name].values)
        return total

    def _say(self, function: RewardFunction, kind: str, why: str, problem: str) -> None:
        """Once for each kind of failure: the share of failures is a metric."""
        if (function.name, kind) in self._said:
            return
        self._said.add((function.name, kind))
        warnings.warn(
            f"{KEY}: {function.target} {why}, for {problem[:60]!r}: it adds nothing to that "
            f"group's rewards; see reward/{function.name}_failed_frac",
            RuntimeWarning,
            stacklevel=3,
        )


class _Callers(Supervisor):
    """Workers that call functions; a reply is a list, or a string: what went wrong."""

    timed_out, crashed = "timeout: ", "crash: "

    def understand(self, reply: Any) -> Any:
        """See `Supervisor`."""
        if isinstance(reply, list):
            numbers = all(x is None or type(x) in (int, float) for x in reply)
            return reply if numbers else None
        return reply if isinstance(reply, str) else None


def _arguments(group: Group, function: RewardFunction) -> str:
    try:
        return json.dumps({name: list(group[name]) for name in function.takes})
    except TypeError as error:
        raise UserError(f"{KEY}: {function.target}: a problem's meta is not JSON: {error}") from (
            error
        )


def _fault(reply: Any, size: int, timeout_s: float) -> tuple[str, str]:
    """The kind of a failure, and in words; ("", "") for none."""
    if isinstance(reply, str):
        kind, _, _ = reply.partition(":")
        ends = {
            "timeout": f"took over {timeout_s:g} s (reward.timeout_s)",
            "crash": "ended its process",
        }
        return kind, ends[kind] if kind in ends else f"raised {reply[:300]}"
    if len(reply) != size:
        return "length", f"returned {len(reply)} numbers for {size} completions"
    bad = [x for x in reply if x is not None and not abs(x) <= _MOST]  # NaN is not, either
    return ("value", f"returned {bad[0]}") if bad else ("", "")
