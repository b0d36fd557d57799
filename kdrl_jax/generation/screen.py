"""Answers at a terminal or in a pipe: as they are drawn, or one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from kdrl_jax.generation.asking import Said, ask
from kdrl_jax.generation.sampler import Sampler
from kdrl_jax.generation.show import Columns, CompileNotice, show_tokens, side_by_side


class Screen:
    """Answers for a person to read, on stdout; what is about them goes to stderr."""

    def __init__(
        self,
        samplers: Sequence[Sampler],
        names: Sequence[str],
        log_probs: bool,
        notice: CompileNotice,
    ):
        self._samplers, self._names, self._log_probs = samplers, names, log_probs
        self._notice, self._console = notice, Console(highlight=False, soft_wrap=False)
        self._live = samplers[0].settings.samples == 1

    def say(self, text: str) -> None:
        """A line that no model said."""
        self._notice.clear()
        print(text, file=sys.stderr, flush=True)

    def answer(
        self,
        prompts: Sequence[Sequence[list[int]]],
        turn: int,
        check: Callable[[], None] = lambda: None,
    ) -> list[Said]:
        """Answer one prompt and show the answers, as they come where there is one of each model.

        Args:
          check: called between tokens; may raise `Interrupted`.
        """
        if self._live and len(self._names) > 1 and side_by_side(self._console):
            with Columns(self._console, self._names) as columns:

                def add(speaker: int, request: int, text: str) -> None:
                    self._notice.clear()
                    columns.add(speaker, text)
                    check()

                found = self._ask(prompts, turn, add)
        elif self._live:
            speaking = -1

            def write(speaker: int, request: int, text: str) -> None:
                nonlocal speaking
                self._notice.clear()
                if speaker != speaking and len(self._names) > 1:
                    sys.stdout.write("\n" * (speaking >= 0) + f"--- {self._names[speaker]}\n")
                speaking = speaker
                sys.stdout.write(text)
                sys.stdout.flush()
                check()

            found = self._ask(prompts, turn, write)
            print(flush=True)
        else:
            found = self._ask(prompts, turn, None)
            self._notice.clear()
            for said in found:
                print(f"--- {self._names[said.speaker]}, sample {said.answer.sample + 1}")
                print(said.answer.text, flush=True)
        for said in found:
            reason, count = said.answer.finish_reason, len(said.answer.tokens)
            if reason != "stop":
                what = "stopped" if reason == "interrupted" else "cut by the limit"
                self.say(f"({self._names[said.speaker]}: {what} after {count} tokens)")
            if said.tokens is not None:
                if len(self._names) > 1:
                    print(f"--- {self._names[said.speaker]}")
                show_tokens(self._console, said.tokens, self._names)
        return found

    def _ask(self, prompts: Sequence[Sequence[list[int]]], turn: int, on_text: Any) -> list[Said]:
        return ask(
            self._samplers, prompts, [0], turn=turn, on_text=on_text, log_probs=self._log_probs
        )
