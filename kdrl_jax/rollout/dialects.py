"""How vLLM and SGLang are asked for completions and given weights, and what they reply.

Read in the sources of vLLM 0.33 and SGLang 0.5.23. Every setting that a server would otherwise take
from the model's generation_config.json, such as a repetition penalty, is sent with each request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from kdrl_jax.rollout.transport import Ask, Busy, Reply
from kdrl_jax.types import UserError

MOST_BIASED = 1024
"""Ids whose logits vLLM shifts in one request, `MAX_NUM_LOGIT_BIAS_TOKENS`."""
ROUNDING = 1e-3
"""A log-prob above 0 by no more is rounding."""
NEVER = -100.0
"""The strongest bias of the OpenAI protocol: a probability of e⁻¹⁰⁰."""


class Drawing(NamedTuple):
    """Sampling settings on the host; see `SamplingParams`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop_ids: tuple[int, ...]
    valid_vocab: int
    """Ids from here on mean nothing and must not be drawn."""
    vocab: int
    """Rows of the output head."""

    @property
    def never(self) -> dict[str, float]:
        """Biases of the ids that must not be drawn; none where they are too many to send."""
        ids = range(self.valid_vocab, self.vocab)
        return {str(i): NEVER for i in ids} if len(ids) <= MOST_BIASED else {}


class Request(NamedTuple):
    """One completion to draw."""

    prompt: tuple[int, ...]
    seed: int
    """63 bits."""
    limit: int
    """Tokens, the end token included."""


class Completion(NamedTuple):
    """What was drawn."""

    tokens: Int[np.ndarray, " n"]
    """The end token included, if there is one."""
    log_probs: Float[np.ndarray, " n"]
    ended: bool
    """By an end token."""


@runtime_checkable
class Dialect(Protocol):
    """The requests of one kind of server."""

    log_prob_flag: str
    """How the server is started so that log-probs are at the sampling temperature."""
    raw_flag: str
    """How it is started so that they are of the full distribution at temperature 1."""
    push_path: str
    """Where it is told to load weights."""
    push_remedy: str
    """How it is started so that it has that path."""

    def draw(self, request: Request, drawing: Drawing) -> Ask:
        """Ask for a `Completion`."""
        ...

    def load(self, folder: Path, version: int) -> list[Ask]:
        """Have the server take its weights from `folder`, one request after the other.

        Args:
          version: of these weights: a later `draw` refuses tokens of others where the server says.
        """
        ...


class VLLM:
    """vLLM's OpenAI-compatible server.

    Log-probs are raw, of the full distribution at temperature 1, unless the server is started with
    `--logprobs-mode processed_logprobs`: then at the temperature, but after top-k, top-p and min-p.
    Weights are loaded by `/collective_rpc` with `reload_weights`, as vLLM's page on sleep mode
    does for RLHF, which a server offers when it is started with VLLM_SERVER_DEV_MODE=1; cached
    prefixes are of the old weights and are dropped.
    """

    log_prob_flag = "--logprobs-mode processed_logprobs"
    raw_flag = "--logprobs-mode raw_logprobs"
    push_path = "/collective_rpc"
    push_remedy = "start it with VLLM_SERVER_DEV_MODE=1"

    def __init__(self, model: str):
        self._model = model

    def draw(self, request: Request, drawing: Drawing) -> Ask:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": request.limit,
            "temperature": drawing.temperature,
            "top_p": drawing.top_p,
            "top_k": drawing.top_k,
            "min_p": drawing.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request.seed,
            "n": 1,
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "ignore_eos": True,  # only these end a completion:
            "stop_token_ids": list(drawing.stop_ids),
            "skip_special_tokens": False,
        }
        if drawing.never:
            body["logit_bias"] = drawing.never

        def read(reply: Reply) -> Completion:
            if not reply.good:
                raise UserError(_refused("/v1/completions", reply))
            choice = _first(reply.content, "choices")
            _settled(choice.get("finish_reason"))
            if choice.get("token_ids") is None:
                raise UserError(
                    "rollout.server.kind: 'vllm', but the server returns no token_ids when asked "
                    "by return_token_ids; use vLLM 0.10.2 or later"
                )
            sent = choice.get("prompt_token_ids")
            if sent is not None and tuple(sent) != request.prompt:
                raise UserError(
                    f"rollout.server.url: the server continued a prompt of {len(sent)} tokens that "
                    f"is not the one of {len(request.prompt)} it was sent; serve the student's "
                    "own model and tokenizer, without prompt truncation"
                )
            found = (choice.get("logprobs") or {}).get("token_logprobs")
            return completion(choice["token_ids"], found, choice["finish_reason"], request, drawing)

        return Ask("POST", "/v1/completions", body, read)

    def load(self, folder: Path, version: int) -> list[Ask]:
        def loaded(reply: Reply) -> None:
            if not reply.good:
                raise UserError(_refused(f"to load {folder}", reply))

        def dropped(reply: Reply) -> None:
            if not reply.good:
                raise UserError(_refused("/reset_prefix_cache", reply))
            if isinstance(reply.content, dict) and reply.content.get("success") is False:
                raise Busy("cached prefixes of old weights are still in use")

        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        return [
            Ask("POST", self.push_path, call, loaded),
            Ask("POST", "/reset_prefix_cache", None, dropped),
        ]


class SGLang:
    """SGLang's native API, `/generate` and `/update_weights_from_disk`.

    Log-probs are at the temperature and before top-k, top-p and min-p, unless the server is
    started with SGLANG_RETURN_ORIGINAL_LOGPROB=1. Seeds count only with
    `--enable-deterministic-inference`.
    """

    log_prob_flag = "SGLANG_RETURN_ORIGINAL_LOGPROB=0"
    raw_flag = log_prob_flag
    push_path = "/update_weights_from_disk"
    push_remedy = "give the address of an SGLang server, not of a router before it"

    def __init__(self) -> None:
        self._version = ""

    def draw(self, request: Request, drawing: Drawing) -> Ask:
        sampling: dict[str, Any] = {
            "max_new_tokens": request.limit,
            "temperature": drawing.temperature,
            "top_p": drawing.top_p,
            "top_k": drawing.top_k or -1,
            "min_p": drawing.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": request.seed,
            "stop_token_ids": list(drawing.stop_ids),  # ignore_eos would switch these off too
            "skip_special_tokens": False,
        }
        if drawing.never:
            sampling["logit_bias"] = drawing.never
        body = {"input_ids": list(request.prompt), "sampling_params": sampling}
        version = self._version

        def read(reply: Reply) -> Completion:
            if not reply.good:
                raise UserError(_refused("/generate", reply))
            about = reply.content.get("meta_info") if isinstance(reply.content, dict) else None
            if not isinstance(about, dict):
                raise UserError(_strange("no meta_info"))
            reason = (about.get("finish_reason") or {}).get("type")
            _settled(reason)
            has = about.get("weight_version")
            if version and has is not None and has != version:
                raise UserError(
                    f"rollout.server.url: tokens were drawn by weights {has!r}, not by "
                    f"{version!r}, which the server was told to load; let no one else load any"
                )
            pairs = about.get("output_token_logprobs")
            if pairs is None:
                raise UserError(_strange("no output_token_logprobs"))
            tokens, log_probs = [p[1] for p in pairs], [p[0] for p in pairs]
            return completion(tokens, log_probs, reason, request, drawing)

        return Ask("POST", "/generate", body | {"return_logprob": True, "stream": False}, read)

    def load(self, folder: Path, version: int) -> list[Ask]:
        self._version = f"kdrl-{version}"

        def loaded(reply: Reply) -> None:
            done = isinstance(reply.content, dict) and reply.content.get("success", True)
            if not reply.good or not done:
                raise UserError(_refused(f"to load {folder}", reply))

        # By default the cache of prefixes, which are of the old weights, is dropped.
        body = {"model_path": str(folder), "weight_version": self._version}
        return [Ask("POST", self.push_path, body, loaded)]


def completion(
    tokens: Sequence[int],
    log_probs: Sequence[float | None] | None,
    reason: str | None,
    request: Request,
    drawing: Drawing,
) -> Completion:
    """What a server drew, checked.

    Args:
      reason: "stop" or "length".

    Raises:
      UserError: it is not a completion of `request` that can be trained on.
    """
    found, stops = list(tokens), drawing.stop_ids
    if log_probs is None or any(x is None for x in log_probs):
        raise UserError(_strange("no log-probs of the tokens"))
    if len(log_probs) != len(found) or not 0 < len(found) <= request.limit:
        raise UserError(
            _strange(
                f"{len(found)} tokens and {len(log_probs)} log-probs where at most {request.limit} "
                "of each were asked for"
            )
        )
    values = np.asarray(log_probs, np.float32)
    if not np.isfinite(values).all() or values.max() > ROUNDING:
        worst = next(x for x in values if not (math.isfinite(x) and x <= ROUNDING))
        raise UserError(
            f"rollout.server.url: {worst} found where log-probs were asked for; start the server "
            "with a logprobs mode that gives log-probs, not logits"
        )
    unknown = [t for t in found if not 0 <= t < drawing.valid_vocab]
    if unknown:
        raise UserError(
            f"rollout.server.url: token {unknown[0]} was drawn, of {drawing.valid_vocab} that the "
            "tokenizer knows; serve the student's own model and tokenizer"
        )
    ended = found[-1] in stops
    if any(t in stops for t in found[:-1]):
        raise UserError(_strange("tokens after an end token"))
    if reason == "stop" and not ended:
        raise UserError(
            f"rollout.server.url: a completion ended by token {found[-1]}, which is none of the "
            f"student's end tokens {list(stops)}, or its end token is missing; serve the model "
            "with the student's generation_config.json"
        )
    if reason == "length" and not ended and len(found) < request.limit:
        raise UserError(
            f"rollout.server.url: a completion was cut after {len(found)} of {request.limit} "
            "tokens; start the server with a longer context (--max-model-len, --context-length)"
        )
    return Completion(np.asarray(found, np.int32), np.minimum(values, 0), ended)


def _settled(reason: Any) -> None:
    """Raises Busy for a request that the server gave up, UserError for a reason unheard of."""
    if reason in (None, "abort", "error"):
        raise Busy(f"a completion with finish reason {reason!r}")
    if reason not in ("stop", "length"):
        raise UserError(_strange(f"finish reason {reason!r}"))


def _first(content: Any, key: str) -> dict[str, Any]:
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list) or len(items) != 1 or not isinstance(items[0], dict):
        raise UserError(_strange(f"not one of {key!r}"))
    return items[0]


def _refused(what: str, reply: Reply) -> str:
    return (
        f"rollout.server.url: the server refused {what} ({reply.words}); see its log, and mend "
        "its flags or the config"
    )


def _strange(what: str) -> str:
    return (
        f"rollout.server.url: the server's reply has {what}; check that rollout.server.kind "
        "names its kind and that its version is supported"
    )
