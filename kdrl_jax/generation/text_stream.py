"""From tokens as they come to text that can be shown at once."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_jax.data import Tokenizer

PARTIAL = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 64
"""Tokens that are decoded again with new ones: what a token looks like may depend on those before
it (a leading space, the bytes of a character)."""


class TextStream:
    """Text piece by piece. The pieces join to what the tokenizer makes of all tokens at once.

    A character whose bytes are not all there yet is held back: it would be shown as U+FFFD. What
    has been shown is never taken back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0
        """Tokens whose text has been shown to the last character."""
        self._shown = 0
        """Characters of the text of `_ids` that have been shown."""

    def add(self, tokens: Sequence[int]) -> str:
        """What can be shown now that these have come too; perhaps nothing."""
        self._ids += [int(token) for token in tokens]
        text = self._tokenizer.decode(self._ids)
        piece = self._take(text.rstrip(PARTIAL))
        if not text.endswith(PARTIAL):
            if len(self._ids) > 2 * CONTEXT and self._done:
                # Both halves of the difference are decoded from the same token on.
                self._ids = self._ids[self._done :]
                self._shown = len(self._tokenizer.decode(self._ids))
            self._done = len(self._ids)
        return piece

    def flush(self) -> str:
        """The rest, when no more tokens come: bytes of no character are U+FFFD."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece
