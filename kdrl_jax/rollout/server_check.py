"""Whether a server can be trained with, asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdrl_jax.data import Tokenizer
from kdrl_jax.rollout.dialects import Completion, Drawing, Request, SGLang
from kdrl_jax.rollout.server import ServerEngine, seed_of
from kdrl_jax.rollout.transport import Ask
from kdrl_jax.types import UserError

HOT = 5.0
"""A temperature at which log-probs differ much from those at 1, for confident models above all."""
PROBE_TOKENS = 8
PROBES = 4
SAME = 0.1
"""Nats by which a token's log-probs of two requests may differ: batches change rounding."""
SURE = -0.05
"""A greedy token of a higher log-prob cannot tell a truncated distribution from a whole one."""


class Wanted(NamedTuple):
    """What a run needs of the server."""

    model: str
    """The name it gives the student; "": any, where it serves only one."""
    longest: int
    """Tokens of the longest prompt with its completion."""
    texts: Sequence[str]
    """Some, to compare tokenizers by."""
    prompts: Sequence[Sequence[int]]
    """Some, to draw a few tokens after."""


def check_server(
    engine: ServerEngine, wanted: Wanted, drawing: Drawing, tokenizer: Tokenizer
) -> list[str]:
    """Ask the server what it is and draw a few tokens, by the weights it has.

    Args:
      drawing: how the run will sample.

    Returns:
      Lines that the user should see.

    Raises:
      UserError: it does not answer, or one line for each reason why it will not do.
    """
    notes: list[str] = []
    problems = _model_problems(engine, wanted)
    problems += _tokenizer_problems(engine, wanted, tokenizer, notes)
    problems += _push_problems(engine)
    if not problems:
        problems += _log_prob_problems(engine, wanted, drawing)
    if problems:
        raise UserError(*problems)
    if isinstance(engine.dialect, SGLang):
        told = engine.server.ask(Ask("GET", "/server_info")).content
        if isinstance(told, dict) and told.get("enable_deterministic_inference") is False:
            notes.append(
                "rollout.server: SGLang ignores seeds, so a repeated run draws other samples; "
                "start it with --enable-deterministic-inference to change that"
            )
    return notes


def _model_problems(engine: ServerEngine, wanted: Wanted) -> list[str]:
    url = engine.server.url
    answer = engine.server.ask(Ask("GET", "/v1/models"))
    cards = answer.content.get("data") if isinstance(answer.content, dict) else None
    if not answer.good or not isinstance(cards, list) or not cards:
        return [
            f"rollout.server.url: {url} lists no models at /v1/models ({answer.words}); give the "
            "address of a vLLM or SGLang server, without a path, and its key if it has one "
            "(KDRL_SERVER_KEY)"
        ]
    names = {str(card.get("id")): card for card in cards}
    # SGLang calls its model by the folder of its newest weights.
    pushed = [name for name in names if name.startswith(str(engine.weights))]
    card = names.get(wanted.model) or next((names[n] for n in pushed), None)
    if card is None and not wanted.model:
        card = cards[0]
    if card is None:
        return [
            f"rollout.server.model: {wanted.model!r} is none of {', '.join(map(repr, names))}, "
            f"which {url} serves; use one of these"
        ]
    limit = card.get("max_model_len")
    if isinstance(limit, int) and limit < wanted.longest:
        return [
            f"rollout.max_new_tokens: with the prompt up to {wanted.longest} tokens, but {url} "
            f"takes {limit}; start it with a longer context (--max-model-len, --context-length), "
            "or lower rollout.max_new_tokens and eval.max_new_tokens"
        ]
    return []


def _tokenizer_problems(
    engine: ServerEngine, wanted: Wanted, tokenizer: Tokenizer, notes: list[str]
) -> list[str]:
    for text in wanted.texts:
        body = {"prompt": text, "add_special_tokens": False}
        body |= {"model": wanted.model} if wanted.model else {}
        answer = engine.server.ask(Ask("POST", "/tokenize", body))
        theirs = answer.content.get("tokens") if isinstance(answer.content, dict) else None
        if not answer.good or theirs is None:
            notes.append(
                f"rollout.server: its tokenizer was not compared ({answer.words}); token ids are "
                "exchanged, so it only has to serve the student's own model"
            )
            return []
        ours = tokenizer.encode(text)
        if list(theirs) != ours:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            return [
                f"rollout.server.url: {engine.server.url} has another tokenizer than the student: "
                f"token {at} of {text[:40]!r} is {theirs[at : at + 1]} to it and "
                f"{ours[at : at + 1]} to the student; serve the student's own model"
            ]
    return []


def _push_problems(engine: ServerEngine) -> list[str]:
    """A route that takes only POST answers a GET by 405, one that does not exist by 404."""
    path = engine.dialect.push_path
    if engine.server.ask(Ask("GET", path)).status != 404:
        return []
    return [
        f"rollout.server.url: {engine.server.url} has no {path}, by which it is told to load "
        f"weights; {engine.dialect.push_remedy}"
    ]


def _log_prob_problems(engine: ServerEngine, wanted: Wanted, drawing: Drawing) -> list[str]:
    """Whether the log-probs are of the full distribution at the sampling temperature."""
    cut = drawing.top_p < 1 or drawing.top_k > 0 or drawing.min_p > 0
    hot = drawing.temperature != 1
    kind = log_prob_kind(engine, wanted.prompts, drawing)
    good = {"scaled"} | (set() if hot else {"raw"}) | (set() if cut else {"cut"})
    if not hot and not cut:
        good.add("unknown")
    if kind in good:
        return []
    url, dialect = engine.server.url, engine.dialect
    now = f"rollout.server.url: {url} gives log-probs"
    if kind == "unknown":
        return [
            f"{now} of which a few greedy tokens do not show whether they are at "
            f"rollout.temperature={drawing.temperature:g}; sample at temperature 1 without "
            "top_p, top_k and min_p"
        ]
    if hot and cut and kind != "scaled":
        fault = "at temperature 1" if kind == "raw" else "of the truncated distribution"
        return [
            f"{now} {fault}, where those of the full one at rollout.temperature="
            f"{drawing.temperature:g} are needed; set rollout.top_p=1, top_k=0 and min_p=0, and "
            f"start it with {dialect.log_prob_flag}"
        ]
    if kind == "raw":
        return [
            f"{now} at temperature 1, not at rollout.temperature={drawing.temperature:g}; start "
            f"it with {dialect.log_prob_flag}, or set rollout.temperature=1"
        ]
    return [
        f"{now} of what rollout.top_p, top_k and min_p leave, where those of the full distribution "
        f"are needed; start it with {dialect.raw_flag}, or set rollout.top_p=1, top_k=0, min_p=0"
    ]


def log_prob_kind(engine: ServerEngine, prompts: Sequence[Sequence[int]], drawing: Drawing) -> str:
    """What the server's log-probs are of, found by drawing the likeliest tokens in two ways.

    With temperature 0 every server gives them at temperature 1. With another temperature and
    top-k 1 the same tokens come, and their log-probs tell.

    Returns:
      raw: of the full distribution at temperature 1, whatever the sampling temperature.
      scaled: of the full distribution at the sampling temperature.
      cut: at the sampling temperature, of what top-k, top-p and min-p leave.
      unknown: the tokens are too certain to tell.
    """
    requests = [
        Request(tuple(prompt), seed_of(np.array([0, number])), PROBE_TOKENS)
        for number, prompt in enumerate(prompts[:PROBES])
    ]
    plain = drawing._replace(top_p=1.0, top_k=0, min_p=0.0)
    ways = (plain._replace(temperature=0.0), plain._replace(temperature=HOT, top_k=1))
    asks = [engine.dialect.draw(request, way) for way in ways for request in requests]
    found: dict[int, Completion] = {}
    with engine.server.ask_all(asks) as answers:
        for some in answers:
            found.update(some)
    pairs: list[tuple[float, float]] = []
    for number in range(len(requests)):
        cold, hot = found[number], found[number + len(requests)]
        # After a tie the continuations differ.
        shared = min(len(cold.tokens), len(hot.tokens))
        same = cold.tokens[:shared] == hot.tokens[:shared]
        shared = shared if same.all() else int(np.argmin(same))
        pairs += zip(cold.log_probs[:shared].tolist(), hot.log_probs[:shared].tolist(), strict=True)
    if any(y < x - SAME for x, y in pairs):  # heat takes from the likeliest token
        return "scaled"
    telling = [(x, y) for x, y in pairs if x < SURE]
    if not telling:
        return "unknown"
    return "cut" if all(y == 0 for _, y in telling) else "raw"
