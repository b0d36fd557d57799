"""Rollouts from a vLLM or SGLang server that is given the student's weights.

The server sees weights as a Hugging Face folder, on a disk that both can read. It draws with
kernels of its own: its log-probs differ from the trainer's by more than rounding, which mismatch/kl
measures and `tis_cap` corrects for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from kdrl_jax import processes
from kdrl_jax.models import Decoder, merged_leaves, save_hf
from kdrl_jax.rollout.call import (
    DecodeStats,
    Finished,
    as_rollouts,
    finished_requests,
    tokens_seen,
)
from kdrl_jax.rollout.dialects import VLLM, Completion, Dialect, Drawing, Request, SGLang
from kdrl_jax.rollout.schedule import longest_first
from kdrl_jax.rollout.transport import Server
from kdrl_jax.types import (
    FINISH_EOS,
    FINISH_LENGTH,
    UNFINISHED,
    Params,
    Prompts,
    Rollouts,
    SamplingParams,
    UserError,
)

KINDS: dict[str, Callable[[str], Dialect]] = {"vllm": VLLM, "sglang": lambda model: SGLang()}
FOLDERS = 2
"""Written in turns, so that a server which still reads the last weights is not disturbed."""


class ServerEngine:
    """An engine (see `Engine`) behind a server; partial rollouts are not supported.

    A request carries a seed made of its key, so a repeated run asks the same. Whether the server
    then draws the same is its own affair: batches change rounding.

    Args:
      server: where it is.
      dialect: see `KINDS`.
      model: the student; its dtype is the one weights are written in.
      weights: folder for them that the server sees under the same path; made when needed.
      tokenizer_folder: with the student's tokenizer, whose files go with the weights.
      stop_ids: its end tokens, for config.json.
      valid_vocab: only ids below it may be drawn, the ids the tokenizer knows.
      prompt_buckets: the padded prompt lengths there may be.
      max_new_tokens: T, the completion slots; the end token takes one.
      evaluation_tokens: the slots of a call that asks for more than T tokens.

    Attributes:
      last: what the last `generate` did; how often the server ran its model is not known, so
        `steps` and `slot_steps` are 0.
      weights: the folder for weights, absolute.
    """

    def __init__(
        self,
        server: Server,
        dialect: Dialect,
        model: Decoder,
        *,
        weights: Path,
        tokenizer_folder: Path | None,
        stop_ids: Sequence[int],
        valid_vocab: int,
        prompt_buckets: Sequence[int],
        max_new_tokens: int,
        evaluation_tokens: int = 0,
    ):
        self.server, self.dialect = server, dialect
        self.prompt_buckets, self.max_new_tokens = tuple(prompt_buckets), max_new_tokens
        self._most = max(max_new_tokens, evaluation_tokens)
        self.last = DecodeStats()
        self._model, self.weights = model, weights.absolute()
        self._tokenizer_folder, self._stop_ids = tokenizer_folder, tuple(stop_ids)
        self._valid_vocab = valid_vocab
        self._pushes = 0
        self._has: list[weakref.ref[Any]] = []  # the leaves of what was pushed last

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
        """See `Engine.generate`. The server is given `params` first unless it has them.

        Raises:
          ValueError: keys for another number of prompts, or partial rollouts.
          UserError: the server fails, or answers what cannot be trained on.
        """
        if begun is not None or enough:
            raise ValueError("begun, enough: a server cannot go on with partial rollouts")
        if request_keys.shape[:1] != prompts.lengths.shape or request_keys.ndim != 2:
            raise ValueError(
                f"request_keys: shape {request_keys.shape} for {len(prompts.lengths)} prompts; "
                "must be [P, G]"
            )
        self.push(params)
        shape = request_keys.shape
        requests = self._requests(prompts, request_keys, sampling)
        drawing = self.drawing(sampling)
        problems = range(shape[0]) if expected_lengths is None else longest_first(expected_lengths)
        # Equal requests, such as repeats that fill a batch up, are asked for once; of several
        # processes each asks for its own.
        places: dict[Request, list[int]] = {}
        for number in (p * shape[1] + g for p in problems for g in range(shape[1])):
            if processes.mine(number):
                places.setdefault(requests[number], []).append(number)
        longer = any(request.limit > self.max_new_tokens for request in requests)
        found = _Found(prompts, shape, self._most if longer else self.max_new_tokens)
        asked = list(places)
        asks = [self.dialect.draw(request, drawing) for request in asked]
        losses = self.server.losses
        with processes.together(), self.server.ask_all(asks) as answers:
            meanwhile()
            for some in answers:
                numbers = [n for which, _ in some for n in places[asked[which]]]
                for which, completion in some:
                    for number in places[asked[which]]:
                        found.put(number, completion)
                on_finished(finished_requests(found.rollouts(), np.array(numbers)))
                progress(*found.counts)
        if processes.any_of(
            self.server.losses > losses
        ):  # a server that started anew has weights of its own
            self._has = []
        found.share()
        first = {request: number for number, request in reversed([*enumerate(requests)])}
        self.last = found.stats(np.array([*first.values()]))
        return found.rollouts()

    def push(self, params: Params) -> None:
        """Have the server load `params`, if it does not have them.

        Raises:
          UserError: it cannot, or the folder cannot be written.
        """
        leaves = jax.tree.leaves(params)  # of adapters beside a base only some are new
        if len(self._has) == len(leaves) and all(
            there() is leaf for there, leaf in zip(self._has, leaves, strict=True)
        ):
            return
        self._has = []
        folder = self.weights / str(self._pushes % FOLDERS)
        try:
            with jax.transfer_guard("allow"):  # one weight at a time through the host
                save_hf(
                    folder,
                    self._model.base,
                    merged_leaves(self._model, params),
                    tokenizer_folder=self._tokenizer_folder,
                    dtype=self._model.dtype,
                    eos_ids=self._stop_ids,
                    overwrite=True,
                    checksums=False,  # of a folder that lives for a step
                )
        except OSError as error:
            raise UserError(
                f"rollout.server.weights: {folder} cannot be written ({error}); name a folder "
                "with room for two copies of the student"
            ) from None
        self._pushes += 1

        def load() -> None:
            for ask in self.dialect.load(folder, self._pushes):
                self.server.ask(ask)

        processes.first_does(load)
        self._has = [weakref.ref(leaf) for leaf in leaves]

    def drawing(self, sampling: SamplingParams) -> Drawing:
        """`sampling` on the host."""
        host = jax.device_get(sampling)
        return Drawing(
            temperature=float(host.temperature),
            top_p=float(host.top_p),
            top_k=int(host.top_k),
            min_p=float(host.min_p),
            stop_ids=tuple(int(i) for i in host.stop_ids if i >= 0),
            valid_vocab=self._valid_vocab,
            vocab=self._model.config.vocab_size,
        )

    def _requests(
        self, prompts: Prompts, request_keys: Key[Array, "P G"], sampling: SamplingParams
    ) -> list[Request]:
        """The P·G requests, problem by problem."""
        problems, group = request_keys.shape
        limits, keys = jax.device_get((sampling.max_new_tokens, jax.random.key_data(request_keys)))
        limits = np.clip(np.broadcast_to(limits, (problems, group)), 1, self._most)
        return [
            Request(
                tuple(prompts.tokens[p, prompts.tokens.shape[1] - prompts.lengths[p] :].tolist()),
                seed_of(keys[p, g]),
                int(limits[p, g]),
            )
            for p in range(problems)
            for g in range(group)
        ]


def seed_of(key: Int[np.ndarray, " words"]) -> int:
    """63 bits of a key's data, as servers take seeds."""
    return int.from_bytes(np.asarray(key, np.uint32).astype(">u4").tobytes()[-8:]) & (2**63 - 1)


class _Found:
    """Completions of P·G requests as they come in."""

    def __init__(self, prompts: Prompts, shape: tuple[int, ...], length: int):
        total = shape[0] * shape[1]
        self._prompts, self._shape = prompts, shape
        self._tokens = np.zeros((total, length), np.int32)
        self._log_probs = np.zeros((total, length), np.float32)
        self._lengths = np.zeros(total, np.int32)
        self._finish = np.full(total, UNFINISHED, np.int32)

    def put(self, number: int, completion: Completion) -> None:
        """The completion of request p·G + g."""
        count = len(completion.tokens)
        self._tokens[number, :count] = completion.tokens
        self._log_probs[number, :count] = completion.log_probs
        self._lengths[number] = count
        self._finish[number] = FINISH_EOS if completion.ended else FINISH_LENGTH

    @property
    def counts(self) -> tuple[int, int]:
        """Requests that have ended, and their tokens."""
        return int((self._finish != UNFINISHED).sum()), int(self._lengths.sum())

    def rollouts(self) -> Rollouts:
        """What there is so far."""
        found = (self._tokens, self._log_probs, self._lengths, self._finish)
        return as_rollouts(self._prompts, self._shape[1], *found)

    def share(self) -> None:
        """Exchange the completions with the other processes, which have asked for theirs."""
        if processes.count() == 1:
            return
        arrays = (self._tokens, self._log_probs, self._lengths, self._finish)
        own = np.arange(processes.index(), len(self._lengths), processes.count())
        longest = int(processes.gather(np.asarray(self._lengths[own].max(initial=0))).max())
        most = -(-len(self._lengths) // processes.count())
        for array in arrays:
            part = array[own, :longest] if array.ndim == 2 else array[own]
            part = np.concatenate([part, np.zeros((most - len(own), *part.shape[1:]), part.dtype)])
            # Process i has the requests i, i + count, …
            everyone = np.swapaxes(processes.gather(part), 0, 1).reshape(-1, *part.shape[1:])
            where = (slice(None), slice(longest)) if array.ndim == 2 else slice(None)
            array[where] = everyone[: len(array)]

    def stats(self, numbers: Int[np.ndarray, " n"]) -> DecodeStats:
        """Of the requests `numbers`, which were asked for."""
        lengths = self._lengths[numbers].astype(np.int64)
        prompts = self._prompts.lengths[numbers // self._shape[1]]
        return DecodeStats(tokens=int(lengths.sum()), context=tokens_seen(prompts, lengths))
