"""Hugging Face fast tokenizers, from a local folder."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from kdrl_jax.data.tokenizer import Message
from kdrl_jax.models.hf_files import TOKENIZER_FILES, load_eos_ids
from kdrl_jax.types import UserError

# Beside the tokenizer's own: it names the ids that end a response.
FILES = (*TOKENIZER_FILES, "generation_config.json")


TEMPLATE_S = 10.0
"""For a chat template to render; a model's takes milliseconds."""
TEMPLATE_MOST = 1_000_000
"""Characters that a chat template may add to the messages."""


class HFTokenizer:
    """The tokenizer of a Hugging Face folder. Nothing is ever downloaded."""

    def __init__(self, folder: str | Path):
        """Read `folder`.

        Raises:
          UserError: a tokenizer that cannot be read, or that has no end token.
        """
        self.folder = Path(folder)
        self._tok = _read(self.folder)
        self.size: int = max(self._tok.get_vocab().values()) + 1
        listed = load_eos_ids(self.folder)
        own = self._tok.eos_token_id
        if own is None and not listed:
            raise UserError(
                f"{self.folder}: the tokenizer has no end token; set eos_token in "
                "tokenizer_config.json"
            )
        self.eos_id: int = listed[0] if own is None else own
        pad = self._tok.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys([self.eos_id, *listed, *self._end_of_turn()])
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: nothing added, nothing cut."""
        return self._tok.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._tok.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` with special tokens as they are written in the vocabulary."""
        return self._tok.decode(
            [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The conversation in the chat template, up to where the assistant's turn begins.

        Raises:
          UserError: no chat template, or one that refuses these messages.
        """
        return self.encode(self._render(messages, add_generation_prompt=True))

    def vocab(self) -> dict[str, int]:
        """All tokens with their ids, added ones included."""
        return dict(self._tok.get_vocab())

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, unchanged."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source, target = self.folder / name, folder / name
            if source.is_file() and not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)

    @functools.cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text of its own accord."""
        bare = self.encode("a")
        full = self._tok.encode("a", add_special_tokens=True, verbose=False)
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return tuple(full[:at])

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if not self._tok.chat_template:
            raise UserError(
                f"data.prompt_style: needs a chat template, which {self.folder} lacks; "
                "use 'plain', or add chat_template.jinja"
            )
        try:
            # In jinja2's sandbox: no attribute that leads to Python, nothing changed.
            with _time_limit(TEMPLATE_S):
                text = self._tok.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            if len(text) > TEMPLATE_MOST + 2 * sum(len(m["content"]) for m in messages):
                raise ValueError(f"it makes {len(text):,} characters of these messages")
            return text
        except (TemplateError, ValueError, ArithmeticError, LookupError) as error:
            reason = str(error)
        except (AttributeError, TypeError, MemoryError, RecursionError, _TooLong) as error:
            reason = f"{type(error).__name__.strip('_')} {error}".rstrip()
        raise UserError(f"{self.folder}: the chat template fails: {reason[:300]}; mend it")

    def _end_of_turn(self) -> list[int]:
        """The special token that the chat template puts behind an assistant's turn, if any."""
        mark = "END-OF-TURN"
        turn: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": mark},
        ]
        try:
            text = self._render(turn, add_generation_prompt=False)
        except UserError:  # no template, or one of another kind: `chat` will say so if it is used
            return []
        _, found, behind = text.rpartition(mark)
        first = self.encode(behind.lstrip())[:1] if found else []
        added = self._tok.added_tokens_decoder
        return [i for i in first if i in added and added[i].special]


class _TooLong(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End what runs within by `_TooLong`; in the main thread, for only there can it be done."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(
        signal.ITIMER_REAL
    ) != (0.0, 0.0):
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _read(folder: Path) -> Any:
    """The tokenizer object. `transformers` is imported here because it takes a second."""
    # Without torch it says at import that there are no models; we use none of its models.
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
    # tokenizer.json says all; AutoTokenizer would rebuild parts of it after the class that
    # tokenizer_config.json names, which for some models is not what they were trained with.
    whole = (folder / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if whole else AutoTokenizer
    try:
        # Code that a folder brings along is not run, and nobody is asked whether it may.
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: unreadable tokenizer ({reason}); copy its files again"
        ) from error
