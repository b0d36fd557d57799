"""A model that answers: its weights, its tokenizer and the rollout engine that draws for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from kdrl_jax.data import Tokenizer, pad_prompts
from kdrl_jax.generation.text_stream import TextStream
from kdrl_jax.models import Decoder
from kdrl_jax.rollout import DRAWING, Drawn, RolloutEngine, request_keys, sampling_params
from kdrl_jax.sharding import put, put_batch, replicated
from kdrl_jax.training.batch import rollout_rows
from kdrl_jax.training.scoring import Scorer
from kdrl_jax.types import FINISH_EOS, UNFINISHED, Params, Rollouts

SHORTEST = 64
"""Tokens of the smallest padded prompt; the others are powers of two times it."""
LIVE_CHUNK = 4
"""Tokens between two looks while somebody reads along."""
SCORED = 128
"""Completions that are scored are padded to a multiple of it: a program for each."""
LOGPROB_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn; see `SamplingParams`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    samples: int
    seed: int


class Answer(NamedTuple):
    """One sampled completion."""

    number: int
    """Of the prompt, among those that were given."""
    sample: int
    text: str
    tokens: list[int]
    """With the end token, if it was drawn."""
    log_probs: list[float]
    """Of the whole distribution at the sampling temperature; at temperature 0, of that at 1."""
    finish_reason: str
    """'stop', 'length', or 'interrupted'."""


class Interrupted(Exception):
    """Somebody asked to stop; raised by what watches the tokens."""


class Sampler:
    """Answers prompts with the engine that training uses: the same draws from the same keys.

    Args:
      name: for people.
      model, params, tokenizer: see `load_policy`; the weights are on `mesh`.
      settings: of all answers.
      live: hand out tokens as they come, few at a time.
      slots: requests that are decoded at once; 0: all.
    """

    def __init__(
        self,
        name: str,
        model: Decoder,
        params: Params,
        tokenizer: Tokenizer,
        mesh: Mesh,
        settings: Settings,
        *,
        live: bool = False,
        slots: int = 0,
    ):
        self.name, self.tokenizer, self.settings = name, tokenizer, settings
        self.window = model.config.max_positions
        self._model, self._params, self._mesh = model, params, mesh
        self.engine = RolloutEngine(
            model,
            valid_vocab=tokenizer.size,
            prompt_buckets=buckets(self.window),
            max_new_tokens=min(settings.max_new_tokens, self.window - 1),
            slots=slots,
            chunk=LIVE_CHUNK if live else 0,
            mesh=mesh,
        )
        self._scorers: dict[int, Scorer] = {}

    def fault(self, prompt: Sequence[int]) -> str:
        """Why a prompt cannot be answered; '' if it can."""
        if not prompt:
            return "is empty"
        if len(prompt) >= self.window:
            return f"has {len(prompt)} tokens, {self.name} a window of {self.window}; shorten it"
        return ""

    def answer(
        self,
        prompts: Sequence[list[int]],
        numbers: Sequence[int],
        *,
        turn: int = 0,
        on_text: Callable[[int, str], None] | None = None,
        size: int = 0,
    ) -> tuple[list[Answer], Rollouts]:
        """`samples` answers to each prompt; a limit of tokens falls to what the window leaves.

        Args:
          prompts: token ids, without a `fault`.
          numbers: which each prompt is: what is drawn depends on seed, turn, number and sample.
          turn: of a conversation.
          on_text: called with (request, text) as text comes, request being p·samples + sample. An
            `Interrupted` from it ends the call: what there is so far is returned.
          size: P of the rollouts, at least as many as prompts: they are filled up with repeats, so
            that a smaller call needs no program of its own.

        Returns:
          Answers, prompt by prompt, and the rollouts that they are of.
        """
        s, size = self.settings, max(size, len(prompts))
        filled = [i % len(prompts) for i in range(size)]
        asked = pad_prompts(
            [prompts[i] for i in filled], self.engine.prompt_buckets, self.tokenizer.pad_id
        )
        shape = (size, s.samples)
        room = np.minimum(s.max_new_tokens, self.window - asked.lengths)
        sampling = sampling_params(
            shape,
            self.tokenizer.stop_ids,
            **{k: getattr(s, k) for k in DRAWING},
        )
        limits = np.broadcast_to(room[:, None], shape).astype(np.int32)
        sampling = dataclasses.replace(sampling, max_new_tokens=jnp.asarray(limits))
        keys = request_keys(s.seed, turn, [numbers[i] for i in filled], s.samples)
        real = len(prompts) * s.samples
        streams = [TextStream(self.tokenizer) for _ in range(real)]
        seen: list[Drawn] = []

        def read(drawn: list[Drawn]) -> None:
            seen.extend(drawn)
            for request in drawn:
                if on_text and request.number < real:
                    stream = streams[request.number]
                    ended = request.finish_reason != UNFINISHED
                    keep = len(request.tokens) - (request.finish_reason == FINISH_EOS)
                    piece = stream.add(request.tokens[:keep].tolist())
                    on_text(request.number, piece + (stream.flush() if ended else ""))

        try:
            out = self.engine.generate(
                self._params, asked, keys, sampling, on_drawn=read if on_text else None
            )
        except Interrupted:
            out = self._so_far(asked, shape, seen)
        return [self._answer(out, number, s.samples) for number in range(real)], out

    def _so_far(self, asked, shape: tuple[int, int], seen: Sequence[Drawn]) -> Rollouts:
        """Rollouts of what was drawn before an interruption."""
        length = self.engine.max_new_tokens
        tokens = np.zeros((shape[0] * shape[1], length), np.int32)
        log_probs, ends = tokens.astype(np.float32), np.zeros(len(tokens), np.int32)
        finish = np.full(len(tokens), UNFINISHED, np.int32)
        for n, new, scores, reason in seen:
            place = slice(ends[n], ends[n] + len(new))
            tokens[n, place], log_probs[n, place] = new, scores
            ends[n], finish[n] = place.stop, reason
        return Rollouts(
            prompt_tokens=asked.tokens,
            prompt_lengths=asked.lengths,
            tokens=tokens.reshape(*shape, length),
            log_probs=log_probs.reshape(*shape, length),
            lengths=ends.reshape(shape),
            finish_reason=finish.reshape(shape),
        )

    def _answer(self, out: Rollouts, number: int, samples: int) -> Answer:
        place = divmod(number, samples)
        length, reason = int(out.lengths[place]), int(out.finish_reason[place])
        tokens = out.tokens[place][:length].tolist()
        names = {FINISH_EOS: "stop", UNFINISHED: "interrupted"}
        return Answer(
            *place,
            text=self.tokenizer.decode(tokens[: length - (reason == FINISH_EOS)]),
            tokens=tokens,
            log_probs=out.log_probs[place][:length].tolist(),
            finish_reason=names.get(reason, "length"),
        )

    def score(self, out: Rollouts) -> Float[np.ndarray, "P G T"]:
        """This model's log-probs of what another one drew, at the settings' temperature (0: 1).

        NaN for a completion with tokens that this model's tokenizer does not know.
        """
        shape, most = out.lengths.shape, out.tokens.shape[-1]
        width = min(most, -(-max(int(out.lengths.max()), 1) // SCORED) * SCORED)
        tokens, known = out.tokens[..., :width], self.tokenizer.size
        prompts = np.asarray(out.prompt_tokens)
        padding = np.arange(prompts.shape[1]) < prompts.shape[1] - out.prompt_lengths[:, None]
        unknown = ((prompts >= known) & ~padding).any(axis=-1, keepdims=True)
        strange = np.logical_or((tokens >= known).any(axis=-1), unknown)
        cut = dataclasses.replace(
            out,
            prompt_tokens=np.where(prompts < known, prompts, 0),
            tokens=np.where(tokens < known, tokens, 0),
            log_probs=out.log_probs[..., :width],
            lengths=np.minimum(out.lengths, width),
        )
        rows = shape[1]
        if rows not in self._scorers:
            self._scorers[rows] = Scorer(
                self._model, self._mesh, rows=rows, valid_vocab=known, chunk=LOGPROB_CHUNK
            )
        heat = put(np.float32(self.settings.temperature or 1.0), replicated(self._mesh))
        placed = rollout_rows(put_batch(self._mesh, cut))
        found = self._scorers[rows].log_probs(self._params, placed, width, heat)
        scores = np.full((*shape, most), np.nan, np.float32)
        scores[..., :width] = np.asarray(jax.device_get(found)).reshape(*shape, width)
        scores[strange] = np.nan
        return scores


def buckets(window: int) -> tuple[int, ...]:
    """Padded prompt lengths: powers of two times SHORTEST, the last one long enough for all."""
    found = [SHORTEST]
    while found[-1] < window - 1:
        found.append(2 * found[-1])
    return tuple(found)
