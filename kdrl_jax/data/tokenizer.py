"""What the program asks of a tokenizer, how one is found, and when two agree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

from kdrl_jax.types import UserError

HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SENTENCEPIECE_FILE = "tokenizer.model"


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no start or end token is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens, such as the end of a text, leave no trace in it."""
        ...

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` with the names of special tokens in it, to be looked at."""
        ...

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the assistant's next turn begins.

        Raises:
          UserError: the tokenizer has no chat template.
        """
        ...

    def vocab(self) -> dict[str, int]:
        """All tokens, the special ones included, as they are stored, with their ids."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write files from which `load_tokenizer` makes the same tokenizer."""
        ...

    @property
    def size(self) -> int:
        """The highest known id + 1; rows of the output head from here on mean nothing."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        ...

    @property
    def pad_id(self) -> int:
        """The id that fills rows; any id does, as padding is masked everywhere."""
        ...

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What a text without a chat template begins with: () or the start token."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion, `eos_id` first."""
        ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a local folder: a Hugging Face one, else `tokenizer.model`.

    Raises:
      UserError: no such folder, no tokenizer in it, or one that cannot be read.
    """
    # Here and not above: these files import this one for its names.
    from kdrl_jax.data.hf_tokenizer import HFTokenizer
    from kdrl_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a local folder with the model's files")
    if any((folder / name).is_file() for name in HF_FILES):
        return HFTokenizer(folder)
    if (folder / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer.load(folder / SENTENCEPIECE_FILE)
    raise UserError(
        f"{folder}: holds no tokenizer; put tokenizer.json or {SENTENCEPIECE_FILE} there"
    )


def check_tokenizer_pair(student: Tokenizer, teacher: Tokenizer) -> None:
    """Refuse a teacher to whom an id that the student can emit means another token.

    The teacher may know more ids. Which of the ids ends a text, or pads it, may differ: base and
    instruct models differ in this.

    Raises:
      UserError: names the first differing id and what it is to either side.
    """
    ours, theirs = student.vocab(), teacher.vocab()
    differing = [(index, token) for token, index in ours.items() if theirs.get(token) != index]
    if not differing:
        return
    index, token = min(differing)
    other = next((name for name, i in theirs.items() if i == index), None)
    raise UserError(
        f"teacher.path: token id {index} is {token!r} to the student's tokenizer and "
        f"{'unknown' if other is None else repr(other)} to the teacher's "
        f"({len(differing)} of {len(ours)} differ); use a teacher with the student's vocabulary"
    )


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[str] | None:
    """What each token adds to `text`, the text of all `ids`: pieces that join to it.

    A character made of several tokens is the last one's, and the others' pieces are empty, as are
    those of special tokens.

    Returns:
      A piece for each id; None where the tokenizer's text is not a sum of what its tokens say.
    """
    # Decoded behind their predecessors, for some tokenizers drop the space a text begins with.
    # Whoever ends on U+FFFD may be part of a character: it waits for the others.
    decode = functools.lru_cache(maxsize=None)(lambda window: tokenizer.decode(list(window)))
    pieces, before, begin = [""] * len(ids), 0, 0
    for i in range(len(ids)):
        known = decode(tuple(ids[before:begin]))
        now = decode(tuple(ids[before : i + 1]))
        if i + 1 < len(ids) and (now.endswith("\N{REPLACEMENT CHARACTER}") or now == known):
            continue
        pieces[i] = now[len(known) :]
        before, begin = begin, i + 1
    return pieces if "".join(pieces) == text else None
