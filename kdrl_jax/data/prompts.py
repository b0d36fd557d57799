"""From problems to prompts, and from prompts to padded rows.

A prompt is never cut: one that is too long is left out, counted and reported.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdrl_jax import processes
from kdrl_jax.config import load_attribute
from kdrl_jax.data.tokenizer import Message, Tokenizer
from kdrl_jax.types import Problem, Prompts, UserError

KEY = "data.prompt_style"
SLOT = "{problem}"
Content = str | list[Message]
"""What a model is given: the beginning of a text, or a conversation."""


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a problem is put to the model.

    suffix: what follows the problem's text.
    chat: whether that is a user's turn in the chat template, or the beginning of a text.
    prefix: what comes before it.
    """

    suffix: str
    chat: bool
    prefix: str = ""

    def __call__(self, problem: Problem) -> Content:
        text = self.prefix + problem.problem + self.suffix
        return [{"role": "user", "content": text}] if self.chat else text


PROMPT_STYLES = {
    # arXiv 2506.02208, the main experiments (in the template of R1-Distill) and zero-RL.
    "kdrl": PromptStyle(
        " Let's think step by step and output the final answer within \\boxed{}.", chat=True
    ),
    "zero_rl": PromptStyle(
        "\nPlease reason step by step, and put your final answer within \\boxed{}.", chat=True
    ),
    "chat": PromptStyle("", chat=True),
    "plain": PromptStyle("", chat=False),
}


def find_style(style: str) -> Callable[[Problem], Content]:
    """How problems are put to the model.

    Args:
      style: a name in PROMPT_STYLES; 'chat:…{problem}…' or 'plain:…{problem}…', a template, in
        which nothing else is replaced; or 'module:function' of the user's own, which is called
        with the problem's text, and with its other columns if it takes `meta`, and returns
        messages for the chat template or a text to go on with.

    Raises:
      UserError: none of these, or a function that cannot be imported or called so.
    """
    if style in PROMPT_STYLES:
        return PROMPT_STYLES[style]
    kind, colon, rest = style.partition(":")
    if SLOT in style:
        if kind not in ("chat", "plain") or rest.count(SLOT) != 1:
            raise UserError(
                f"{KEY}: {style!r} is no template; write 'chat:…{SLOT}…' for a user's turn or "
                f"'plain:…{SLOT}…' for the beginning of a text, with {SLOT} once"
            )
        before, _, after = rest.partition(SLOT)
        return PromptStyle(after, kind == "chat", before)
    if not colon:
        names = ", ".join(PROMPT_STYLES)
        near = difflib.get_close_matches(style, PROMPT_STYLES, n=1, cutoff=0.5)
        raise UserError(
            f"{KEY}: {style!r} is unknown; use one of {names}"
            + (f" (the nearest is {near[0]!r})" if near else "")
        )
    if kind in ("chat", "plain"):
        raise UserError(f"{KEY}: {style!r} has no {SLOT}, where the problem's text goes; add it")
    return _own_style(style)


def _own_style(style: str) -> Callable[[Problem], Content]:
    function = load_attribute(KEY, style, callable, "functions")
    if not callable(function):
        raise UserError(f"{KEY}: {style!r} is no function but {function!r}; name another")
    try:
        parameters = inspect.signature(function).parameters
        keywords: dict[str, Any] = {"meta": {}} if "meta" in parameters else {}
        inspect.signature(function).bind("", **keywords)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{KEY}: {style!r} cannot be called with a problem's text ({error}); make it "
            "function(problem) or function(problem, meta)"
        ) from error

    def content(problem: Problem) -> Content:
        try:
            found = function(problem.problem, **({"meta": problem.meta} if keywords else {}))
        except Exception as error:
            raise UserError(
                f"{KEY}: {style!r} raised {type(error).__name__}: {error}, for problem "
                f"{problem.id}; mend it"
            ) from error
        if not isinstance(found, str) and not _is_conversation(found):
            raise UserError(
                f"{KEY}: {style!r} returned {found!r:.80}, for problem {problem.id}; return a text "
                "or [{'role': 'user', 'content': text}]"
            )
        return found

    return content


def _is_conversation(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in found)
        and all(isinstance(turn["content"], str) for turn in found)
    )


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """How many problems `encode_prompts` was given and kept; `str()` of it is one phrase."""

    kept: int
    total: int
    max_tokens: int

    def __str__(self) -> str:
        dropped = self.total - self.kept
        if not dropped:
            return f"all {self.total} kept"
        return f"{self.kept} of {self.total} kept, {dropped} longer than {self.max_tokens} tokens"


def encode_prompts(
    problems: Sequence[Problem], tokenizer: Tokenizer, style: str, max_tokens: int
) -> tuple[list[tuple[Problem, list[int]]], PromptReport]:
    """The problems with their prompts' token ids, in order, without the too long ones.

    Of several processes each tokenises its share, and all have the result.

    Args:
      style: see `find_style`.
      max_tokens: of a whole prompt, the chat template's tokens included.

    Raises:
      UserError: see `find_style` and `encode_content`; what a function of the user's own raises.
    """
    count = processes.count()
    content = find_style(style)
    share = problems[processes.index() :: count]
    with processes.together():
        own = [encode_content(content(problem), tokenizer) for problem in share]
    everyone = processes.gather_rows(own) if count > 1 else [own]
    encoded = ((x, everyone[i % count][i // count]) for i, x in enumerate(problems))
    kept = [(problem, ids) for problem, ids in encoded if len(ids) <= max_tokens]
    return kept, PromptReport(len(kept), len(problems), max_tokens)


def shown_prompt(problem: Problem, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns lines for a person: a prompt as the model gets it, special tokens by their names."""
    lines = tokenizer.spell(ids).split("\n")
    name = f" ({problem.id})" if problem.id else ""
    head = f"the first prompt{name}, {len(ids)} tokens, as the model gets it:"
    return "\n".join([head, *(f"  | {line}" for line in lines)])


def encode_prompt(problem: Problem, tokenizer: Tokenizer, style: str) -> list[int]:
    """The token ids of one problem's prompt, the chat template's included; see `encode_prompts`."""
    return encode_content(find_style(style)(problem), tokenizer)


def encode_content(content: Content, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a text that is to go on, or of a conversation that waits for an answer.

    Raises:
      UserError: a conversation, where the tokenizer has no chat template.
    """
    if isinstance(content, str):
        return [*tokenizer.start_ids, *tokenizer.encode(content)]
    return tokenizer.chat(content)


def prompt_lengths(buckets: Sequence[int], longest: int) -> tuple[int, ...]:
    """The padded lengths of prompts: `buckets`, or, where there are none, powers of two.

    These begin with 64; the last is `longest`.
    """
    powers = [2**n for n in range(6, longest.bit_length()) if 2**n < longest]
    return tuple(buckets) or (*powers, longest)


def pad_prompts(prompts: Sequence[Sequence[int]], buckets: Sequence[int], pad_id: int) -> Prompts:
    """Rows of one length S, padded on the left.

    Args:
      prompts: P lists of token ids, none empty.
      buckets: the lengths to choose S from; it is the smallest that fits all.

    Returns:
      tokens [P, S] and lengths [P], int32 on the host.

    Raises:
      UserError: a prompt is longer than every bucket.
    """
    lengths = [len(ids) for ids in prompts]
    if not all(lengths) or not lengths:
        raise ValueError("every prompt must have a token")
    longest = max(lengths)
    width = min((b for b in buckets if b >= longest), default=None)
    if width is None:
        raise UserError(
            f"data.prompt_buckets: {tuple(buckets)} has no room for a prompt of {longest} "
            "tokens; add a longer one or lower data.max_prompt_tokens"
        )
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[width - len(ids) :] = ids
    return Prompts(tokens, np.array(lengths, np.int32))
