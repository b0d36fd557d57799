"""A model that is open for questions: found, checked and loaded, with the settings of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kdrl_jax.config import CONFIGS, load_config, saved_config
from kdrl_jax.data import Tokenizer, encode_content, find_style
from kdrl_jax.evaluation.model import PolicyFolder, find_policy, load_policy
from kdrl_jax.generation.conversation import History
from kdrl_jax.generation.sampler import Sampler, Settings
from kdrl_jax.rollout import DRAWING
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.compilation_cache import enable_compilation_cache
from kdrl_jax.training.display import Display
from kdrl_jax.types import Problem, UserError

USUAL_TOKENS = 1024
LIMITS: dict[str, tuple[float, float | None, str]] = {
    "max_new_tokens": (1, None, "must be at least 1"),
    "temperature": (0, None, "must not be negative"),
    "top_p": (1e-9, 1, "must be above 0 and at most 1"),
    "top_k": (0, None, "must not be negative"),
    "min_p": (0, 1, "must be from 0 to 1"),
    "samples": (1, None, "must be at least 1"),
    "seed": (0, 2**32 - 1, "must be from 0 to 2**32 - 1"),
}
"""Least and greatest value of each setting."""


def limit_problems(values: Mapping[str, Any], option: str = "") -> list[str]:
    """Returns a line for each setting that is out of its limits.

    Args:
      option: stands before a name on the command line.
    """
    found = []
    for name, (least, most, rule) in LIMITS.items():
        value = values[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not value >= least or not (most is None or value <= most):
            found.append(f"{option}{name}: {value} {rule}")
    return found


def run_settings(policy: PolicyFolder) -> dict[str, Any]:
    """Returns what a run's config has of drawing, with the usual for what it has not."""
    file = policy.folder / "config.json"
    own = policy.step is not None and file.is_file()
    config = saved_config(file) if own else load_config(CONFIGS / "base.py")
    found = {key: config.rollout[key] for key in DRAWING} | {"cache_dir": config.cache_dir}
    return found | (
        {"prompt_style": config.data.prompt_style} if own else {"max_new_tokens": USUAL_TOKENS}
    )


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template."""
    try:
        return bool(tokenizer.chat([{"role": "user", "content": "a"}]))
    except UserError:
        return False


def usual_dtype() -> str:
    """The dtype that a model answers in where none is given."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


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
    policy = find_policy(model, "model", display=Display())
    tokenizer, known = policy.tokenizer(), run_settings(policy)
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
