"""A conversation, at a terminal or from a pipe: what has been said goes into each prompt."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kdrl_jax.data import Message, encode_content, find_style
from kdrl_jax.generation.asking import Said
from kdrl_jax.generation.sampler import Interrupted, Sampler
from kdrl_jax.types import Problem, UserError

HELP = """\
/reset  forget what has been said
/quit   leave; so does Ctrl-D
/help   this
Ctrl-C stops an answer. Anything else is for the model."""

Answering = Callable[[list[list[list[int]]], int, Callable[[], None]], list[Said]]
"""(prompts of each model, turn, a check that raises once somebody has pressed Ctrl-C) → answers."""


class History:
    """What one model has been asked and has answered.

    Args:
      style: a prompt style; one that makes texts instead of messages has no history.
    """

    def __init__(self, sampler: Sampler, style: str):
        self._sampler, self._style = sampler, find_style(style)
        self.messages: list[Message] = []
        self._asked: list[Message] = []

    def prompt(self, text: str) -> list[int]:
        """The token ids of all that was said and of `text`.

        Raises:
          UserError: they leave no room for an answer; nothing has been asked then.
        """
        content = self._style(Problem("conversation", text, ""))
        self._asked = [] if isinstance(content, str) else content
        whole = content if isinstance(content, str) else self.messages + content
        ids = encode_content(whole, self._sampler.tokenizer)
        if fault := self._sampler.fault(ids):
            remedy = "; /reset forgets what was said" if self.messages else ""
            raise UserError(f"the prompt {fault}{remedy}")
        return ids

    def answered(self, text: str) -> None:
        """The last prompt is now part of the past, with its answer."""
        if self._asked:
            self.messages += [*self._asked, {"role": "assistant", "content": text}]


def read_turn(_: str) -> str:
    """Returns a line of stdin that is no terminal; nothing is printed to ask for it.

    Raises:
      EOFError: there is none any more.
    """
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def converse(
    samplers: Sequence[Sampler],
    style: str,
    answering: Answering,
    say: Callable[[str], Any],
    read: Callable[[str], str] = input,
) -> None:
    """Read lines and have them answered, until /quit or the end of the input.

    Args:
      say: shows a line that is not the model's.
      read: shows a prompt and returns a line; EOFError ends the conversation.
    """
    histories = [History(sampler, style) for sampler in samplers]
    if read is input:
        say("/help says what there is; Ctrl-C stops an answer")
    turn = 0
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D leaves")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            histories = [History(sampler, style) for sampler in samplers]
            say("forgotten")
        elif line.startswith("/") and " " not in line:
            say(HELP if line == "/help" else f"no command {line}\n{HELP}")
        elif line:
            try:
                prompts = [[history.prompt(line)] for history in histories]
            except UserError as error:
                say("\n".join(f"error: {problem}" for problem in error.problems))
                continue
            with stoppable() as check:
                found = answering(prompts, turn, check)
            for said in found:
                histories[said.speaker].answered(said.answer.text)
            turn += 1


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Ctrl-C within only makes the check that this gives raise `Interrupted`; a second one ends
    the program."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise Interrupted

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
