"""SentencePiece models: the character tokenizer of the built-in tasks, and `tokenizer.model`."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from kdrl_jax.data.tokenizer import SENTENCEPIECE_FILE, Message
from kdrl_jax.types import UserError

REASONING_PIECES = ("<think>", "</think>", "\\boxed{", "}")
SPACE = "▁"  # how SentencePiece stores a space
PAD, EOS, UNKNOWN = 0, 1, 2


class SentencePieceTokenizer:
    """A SentencePiece model."""

    def __init__(self, model: bytes, source: str = "SentencePiece model"):
        """`model`: a serialised ModelProto; `source` names it in errors.

        Raises:
          UserError: not a model, or one without an end token.
        """
        self._model, self._source = model, source
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{source}: not a SentencePiece model; copy the file again") from error
        if self._sp.eos_id() < 0:
            raise UserError(f"{source}: defines no end token; use a tokenizer with one")

    @classmethod
    def train(cls, alphabet: str) -> SentencePieceTokenizer:
        """One id per character of `alphabet` and per reasoning piece (`<think>`, `\\boxed{`, …).

        The same characters give the same model, byte by byte. Text passes through unchanged.
        """
        characters = sorted(set(alphabet) - set(REASONING_PIECES))
        if not characters or SPACE in characters:
            raise ValueError(f"alphabet {alphabet!r}: must not be empty nor contain {SPACE!r}")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["".join(characters)]),
            model_writer=model,
            model_type="char",
            vocab_size=3 + len(REASONING_PIECES) + len(characters),
            character_coverage=1.0,
            user_defined_symbols=list(REASONING_PIECES),
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            unk_surface="\N{REPLACEMENT CHARACTER}",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue(), "built-in tokenizer")

    @classmethod
    def load(cls, file: str | Path) -> SentencePieceTokenizer:
        """Read a `tokenizer.model`.

        Raises:
          UserError: cannot be read, or not a usable model.
        """
        try:
            return cls(Path(file).read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; give a SentencePiece model") from error

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, no end token.

        Raises:
          UserError: a character that the model does not know.
        """
        ids = self._sp.encode(text)
        if self._sp.unk_id() in ids:
            strange = [c for c in text if self._sp.unk_id() in self._sp.encode(c)]
            raise UserError(
                f"{self._source}: has no token for {', '.join(map(repr, dict.fromkeys(strange)))} "
                f"in {text[:60]!r}; use a tokenizer that covers the data"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the end and padding ids leave no trace, the unknown one is U+FFFD."""
        return self._sp.decode([int(i) for i in ids])

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` with the names of start, end and padding in it."""
        runs = itertools.groupby((int(i) for i in ids), self._sp.is_control)
        return "".join(
            "".join(map(self._sp.id_to_piece, run)) if named else self._sp.decode(list(run))
            for named, run in runs
        )

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """There is no chat template: always a UserError."""
        raise UserError(
            f"data.prompt_style: needs a chat template, which {self._source} lacks; use 'plain'"
        )

    def vocab(self) -> dict[str, int]:
        """All pieces with their ids."""
        return {self._sp.id_to_piece(i): i for i in range(self.size)}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / SENTENCEPIECE_FILE).write_bytes(self._model)

    @functools.cached_property
    def size(self) -> int:
        return self._sp.vocab_size()

    @property
    def eos_id(self) -> int:
        return self._sp.eos_id()

    @property
    def pad_id(self) -> int:
        return self._sp.pad_id() if self._sp.pad_id() >= 0 else self._sp.eos_id()

    @property
    def start_ids(self) -> tuple[int, ...]:
        return (self._sp.bos_id(),) if self._sp.bos_id() >= 0 else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)
