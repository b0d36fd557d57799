r"""What a response must look like, and where its final answer is. Linear in the text's length.

A final answer has one of FORMS: the content of the last `\boxed{}`, the last number, or the whole
text that follows the reasoning.
"""

from __future__ import annotations

import re

from kdrl_jax.rewards.number_answer import last_number

THINK, END_THINK = "<think>", "</think>"
FORMS = ("boxed", "last_number", "text")
"""The forms of an answer that are read here; a task may have one of its own."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"(?![(\[])[^\s$]+")


def has_format(text: str, form: str = "boxed") -> bool:
    r"""Returns whether a completion reasons once and then answers (arXiv 2506.02208, main setting).

    Required: exactly one `</think>`; at most one `<think>`, with nothing but white space before
    it; an answer of `form` after the `</think>`, for "boxed" a closed `\boxed{...}`. The opening
    `<think>` may be missing from the completion because some chat templates (R1-Distill's) end the
    prompt with it. Text around the box is free; a box inside the reasoning is not an answer.
    """
    return final_answer(text, require_format=True, form=form) is not None


def answer_part(text: str) -> str | None:
    """What follows the reasoning, or None if the `<think>` tags are not as `has_format` asks."""
    head, end, answer = text.partition(END_THINK)
    if not end or END_THINK in answer or THINK in answer:
        return None
    before, _, reasoning = head.partition(THINK)
    if THINK in head and (before.strip() or THINK in reasoning):
        return None
    return answer


def after_reasoning(text: str) -> str | None:
    """Returns what follows the last `</think>`: all of `text` where there are no tags.

    None: a `<think>` stands behind it, so the reasoning goes on to the end.
    """
    _, _, part = text.rpartition(END_THINK)
    return None if THINK in part else part


def final_answer(text: str, *, require_format: bool, form: str = "boxed") -> str | None:
    r"""Returns the final answer of a completion, or None where it has none.

    Args:
      require_format: None, too, where the `<think>` tags are not as `has_format` asks; the answer
        is then looked for behind `</think>` alone.
      form: one of FORMS. "boxed": the content of the last box, without the format wherever it is.
        "last_number": see `number_answer`; "text": everything, stripped, None for nothing. Both
        leave out what precedes the last `</think>`.
    """
    if require_format:
        part = answer_part(text)
    else:
        part = text if form == "boxed" else after_reasoning(text)
    if part is None:
        return None
    if form == "boxed":
        return last_boxed(part)
    return last_number(part) if form == "last_number" else part.strip() or None


def as_response(answer: str, form: str) -> str:
    r"""Returns a completion in the required format whose answer, of one of FORMS, is `answer`."""
    return "<think></think>" + (f"\\boxed{{{answer}}}" if form == "boxed" else answer)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`), stripped; None if there is none.

    Only the last box counts: if it never closes (a truncated response) the result is None and
    not an earlier box. Of nested boxes the innermost last one is taken. Escaped braces (`\{`) do
    not count as braces. `\boxed 5`, without braces, gives the characters up to the next space or
    dollar sign.
    """
    box = None
    for box in _BOX.finditer(text):  # noqa: B007 (the last one)
        pass
    return _content(text, box.end()) if box else None


def _content(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        bare = _BARE.match(text, start)
        return bare[0].rstrip(".,;:") or None if bare else None
    depth = 0
    for token in _BRACES.finditer(text, start):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return text[start + 1 : token.start()].strip()
    return None
