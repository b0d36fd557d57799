"""Asking a model as functions: prompts, and a conversation."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kdrl_jax.api.common import Function, Log, speaking_as, text_of
from kdrl_jax.data import encode_content, find_style
from kdrl_jax.evaluation.model import find_policy, load_policy
from kdrl_jax.generation.conversation import History
from kdrl_jax.generation.sampler import Answer, Sampler, Settings
from kdrl_jax.generation.settings import (
    has_template,
    limit_problems,
    run_settings,
    usual_dtype,
)
from kdrl_jax.rollout import DRAWING
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display
from kdrl_jax.types import Problem, UserError


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer of a model to a prompt.

    Attributes:
      prompt: its place among the prompts.
      sample: its number among the answers to this prompt.
      text: without the end token.
      tokens: ids, with the end token if it was drawn.
      log_probs: of each token, at the temperature it was drawn at (at 0: of temperature 1).
      finish_reason: 'stop' or 'length'.
    """

    prompt: int
    sample: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: str


def generate(
    model: str | Path,
    prompts: str | Sequence[str],
    *,
    samples: int = 1,
    seed: int = 0,
    prompt_style: Function | None = None,
    dtype: str | None = None,
    batch: int = 16,
    log: Log = "text",
    **drawing: float,
) -> list[Completion]:
    """Returns a model's answers to prompts, prompt by prompt.

    Args:
      model: a folder, a run's folder, RUN/checkpoints/STEP, or OWNER/NAME[@REVISION] of the hub.
      prompts: one text or several.
      samples: answers to each prompt.
      prompt_style: default: the run's, else the chat template if the model has one.
      dtype: default: float32 on a CPU, else bfloat16.
      batch: prompts that are answered at once.
      log: 'text' says what takes long, such as a download, 'quiet' nothing.
      drawing: max_new_tokens, temperature, top_p, top_k, min_p; default: the run's, else 1024
        tokens at temperature 0.6.

    Raises:
      UserError: no such model, values out of range, or a prompt that does not fit.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    with speaking_as(log):
        opened = open_model(
            model,
            dtype=dtype,
            prompt_style=_style(prompt_style),
            samples=samples,
            seed=seed,
            slots=batch * samples,
            drawing=drawing,
        )
        return [
            Completion(start + answer.number, *answer[1:])
            for start in range(0, len(texts), batch)
            for answer in _answers(opened, texts[start : start + batch], start)
        ]


def _style(given: Function | None) -> str | None:
    return None if given is None else text_of(given, "data.prompt_style")


def _answers(opened: Opened, texts: Sequence[str], start: int) -> list[Answer]:
    prompts = [opened.encode(text, f"prompts[{start + i}]") for i, text in enumerate(texts)]
    numbers = range(start, start + len(texts))
    return opened.sampler.answer(prompts, numbers)[0]


class Chat:
    """A conversation with a model; made by `chat`.

    Attributes:
      messages: all that was said, as a chat template takes it.
    """

    def __init__(self, opened: Opened, log: Log = "text"):
        self._opened, self._log, self._turn = opened, log, 0
        self._history = opened.history()

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": m["role"], "content": m["content"]} for m in self._history.messages]

    def ask(self, text: str, *, on_text: Callable[[str], Any] | None = None) -> str:
        """Returns the model's answer to `text` after all that was said before.

        Args:
          on_text: called with each piece of the answer as it is drawn.

        Raises:
          UserError: the conversation leaves no room for an answer.
        """
        ids = self._history.prompt(text)
        shown = contextlib.redirect_stdout(sys.stdout)  # what `on_text` prints is no log

        def tell(request: int, piece: str) -> None:
            assert on_text is not None
            with shown:
                on_text(piece)

        with speaking_as(self._log):
            [answer] = self._opened.sampler.answer(
                [ids], [0], turn=self._turn, on_text=tell if on_text else None
            )[0]
        self._history.answered(answer.text)
        self._turn += 1
        return answer.text

    def reset(self) -> None:
        """Forgets what was said."""
        self._history, self._turn = self._opened.history(), 0


def chat(
    model: str | Path,
    *,
    seed: int = 0,
    prompt_style: Function | None = None,
    dtype: str | None = None,
    log: Log = "text",
    **drawing: float,
) -> Chat:
    """Returns a conversation with a model; arguments as of `generate`."""
    style = _style(prompt_style)
    with speaking_as(log):
        opened = open_model(
            model, dtype=dtype, prompt_style=style, seed=seed, drawing=drawing, live=True
        )
    return Chat(opened, log)


class Opened:
    """A loaded model and how prompts are put to it.

    Attributes:
      sampler: draws the answers.
      style: see `find_style`.
    """

    def __init__(self, sampler: Sampler, style: str):
        self.sampler, self.style = sampler, style
        self._content = find_style(style)

    def encode(self, text: str, name: str) -> list[int]:
        """Returns the token ids of a prompt.

        Args:
          name: of the prompt, for errors.

        Raises:
          UserError: it is empty, or longer than the model's window.
        """
        if not isinstance(text, str):
            raise UserError(f"{name}: {type(text).__name__} is no text; give a string")
        ids = encode_content(self._content(Problem(name, text, "")), self.sampler.tokenizer)
        if fault := self.sampler.fault(ids):
            raise UserError(f"{name}: the prompt {fault}")
        return ids

    def history(self) -> History:
        """Returns a conversation that has not begun."""
        return History(self.sampler, self.style)


def open_model(
    model: str | Path,
    *,
    dtype: str | None = None,
    prompt_style: str | None = None,
    samples: int = 1,
    seed: int = 0,
    slots: int = 0,
    live: bool = False,
    drawing: Mapping[str, Any],
) -> Opened:
    """Loads a model on the first device.

    Args:
      model: see `find_policy`.
      dtype, prompt_style: None: see `usual_dtype`; the run's, else the chat template or none.
      samples, seed, drawing: see `Settings`; what `drawing` has not is the run's.
      slots, live: see `Sampler`.

    Raises:
      UserError: no such model, or a setting that is none or out of its limits; before weights are
        loaded.
    """
    policy = find_policy(model, "model", display=Display(beside=True))
    tokenizer, known = policy.tokenizer(), run_settings(policy.folder, policy.step)
    problems = [
        f"{name}: is no setting; there are {', '.join(DRAWING)}"
        for name in drawing.keys() - DRAWING
    ]
    values = {key: drawing.get(key, known[key]) for key in DRAWING}
    problems += limit_problems(values | {"samples": samples, "seed": seed})
    if dtype not in (None, "float32", "bfloat16"):
        problems.append(f"dtype: {dtype!r} is none of 'float32', 'bfloat16'")
    usual = "chat" if has_template(tokenizer) else "plain"
    style = prompt_style or known.get("prompt_style", usual)
    try:
        find_style(style)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    enable_compilation_cache(Path(known["cache_dir"]))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    loaded = load_policy(policy, mesh, dtype or usual_dtype())
    settings = Settings(**values, samples=samples, seed=seed)
    return Opened(Sampler(policy.name, *loaded, mesh, settings, live=live, slots=slots), style)
