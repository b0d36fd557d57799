"""What the trainer asks of a source of rollouts, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

from kdrl_jax.rollout.call import DecodeStats, Finished
from kdrl_jax.types import Params, Prompts, Rollouts, SamplingParams


@runtime_checkable
class Engine(Protocol):
    """Samples completions: `RolloutEngine` in this process, `ServerEngine` through a server."""

    last: DecodeStats
    """What the last `generate` did, as far as it is known."""

    @property
    def prompt_buckets(self) -> tuple[int, ...]:
        """The padded prompt lengths there may be, growing."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """T, the completion slots; the end token takes one."""
        ...

    def generate(
        self,
        params: Params,
        prompts: Prompts,
        request_keys: Key[Array, "P G"],
        sampling: SamplingParams,
        *,
        expected_lengths: Sequence[float] | None = None,
        meanwhile: Callable[[], Any] = lambda: None,
        on_finished: Callable[[list[Finished]], Any] = lambda finished: None,
        progress: Callable[[int, int], Any] = lambda finished, tokens: None,
        begun: Rollouts | None = None,
        enough: int = 0,
    ) -> Rollouts:
        """G completions of each of P prompts, as host arrays.

        Args:
          params: the policy's weights, in their shards.
          prompts: left-padded to one of the buckets.
          request_keys: `[P, G]`, see `request_keys`; a request's draws follow from its own key.
          sampling: for the [P, G] requests.
          expected_lengths: of the completions of each problem: the longest start first.
          meanwhile: called once, when the requests are under way.
          on_finished: called with every request that has ended, some at a time.
          progress: called now and then with the number of requests that have ended and of tokens
            drawn so far.
          begun, enough: partial rollouts; see `RolloutEngine.generate`. Not every engine has them.
        """
        ...
