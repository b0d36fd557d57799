r"""What a response must look like, and where its final answer is. Linear in the text's length."""

from __future__ import annotations

import re

THINK, END_THINK = "<think>", "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"(?![(\[])[^\s$]+")


def has_format(text: str) -> bool:
    r"""Whether a completion reasons once and then answers (arXiv 2506.02208, main setting).

    Required: exactly one `</think>`; at most one `<think>`, with nothing but white space before
    it; a closed `\boxed{...}` after the `</think>`. The opening `<think>` may be missing from the
    completion because some chat templates (R1-Distill's) end the prompt with it. Text around the
    box is free; a box inside the reasoning is not an answer.
    """
    part = answer_part(text)
    return part is not None and last_boxed(part) is not None


def answer_part(text: str) -> str | None:
    """What follows the reasoning, or None if the `<think>` tags are not as `has_format` asks."""
    head, end, answer = text.partition(END_THINK)
    if not end or END_THINK in answer or THINK in answer:
        return None
    before, _, reasoning = head.partition(THINK)
    if THINK in head and (before.strip() or THINK in reasoning):
        return None
    return answer


def final_answer(text: str, *, require_format: bool) -> str | None:
    r"""The content of the last box: of the answer part if the format is required, else of all.

    None: there is no such box, or the format is required and not kept.
    """
    part = answer_part(text) if require_format else text
    return None if part is None else last_boxed(part)


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
