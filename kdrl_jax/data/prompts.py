"""From problems to prompts, and from prompts to padded rows.

A prompt is never cut: one that is too long is left out, counted and reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kdrl_jax import processes
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.types import Problem, Prompts, UserError


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a problem is put to the model.

    suffix: what follows the problem's text.
    chat: whether that is a user's turn in the chat template, or the beginning of a text.
    """

    suffix: str
    chat: bool


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
      style: a name in PROMPT_STYLES.
      max_tokens: of a whole prompt, the chat template's tokens included.

    Raises:
      UserError: an unknown style, or one that needs a chat template where there is none.
    """
    count = processes.count()
    own = [encode_prompt(x, tokenizer, style) for x in problems[processes.index() :: count]]
    everyone = processes.gather_rows(own) if count > 1 else [own]
    encoded = ((x, everyone[i % count][i // count]) for i, x in enumerate(problems))
    kept = [(problem, ids) for problem, ids in encoded if len(ids) <= max_tokens]
    return kept, PromptReport(len(kept), len(problems), max_tokens)


def encode_prompt(problem: Problem, tokenizer: Tokenizer, style: str) -> list[int]:
    """The token ids of one problem's prompt, the chat template's included; see `encode_prompts`."""
    if style not in PROMPT_STYLES:
        names = ", ".join(PROMPT_STYLES)
        raise UserError(f"data.prompt_style: {style!r} is unknown; use one of {names}")
    text = problem.problem + PROMPT_STYLES[style].suffix
    if PROMPT_STYLES[style].chat:
        return tokenizer.chat([{"role": "user", "content": text}])
    return [*tokenizer.start_ids, *tokenizer.encode(text)]


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
