"""The scalars of a run in Weights & Biases, by option: `wandb.project`.

Whatever goes wrong there is said once, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ml_collections import ConfigDict

from kdrl_jax.config import to_json
from kdrl_jax.training.storage import write_atomic

KEPT = "wandb.json"
INIT_S = 30.0
"""Seconds that the service has to answer at the start."""


def wandb_problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """What of the keys `wandb.*` cannot be: a line each."""
    project = flat["wandb.project"]
    if project and not importlib.util.find_spec("wandb"):
        yield (
            f"wandb.project: {project!r}, but wandb is not installed; pip install 'kdrl_jax[wandb]'"
        )
    for key in ("wandb.entity", "wandb.name"):
        if flat[key] and not project:
            yield f"{key}: {flat[key]!r}, but wandb.project is empty; name a project"


class WandbRun:
    """A W&B run that goes on where a training run does.

    `WORKDIR/wandb.json` holds the id and the last step that was handed over: a continued run
    appends to the same W&B run, and steps that are made again are not logged again. Without a key
    (WANDB_API_KEY or `wandb login`), with WANDB_MODE=offline or offline=True the data stay in
    `WORKDIR/wandb`, from where `wandb sync` uploads them.

    Args:
      start: the step that the run continues after; None: it begins, under a new id.
      say: prints a line.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, start: int | None, say: Callable[[str], None]
    ):
        self._say, self._file = say, workdir / KEPT
        self._run: Any = None
        self._last = -1
        self._try(lambda: self._begin(config, workdir, start))

    def _begin(self, config: ConfigDict, workdir: Path, start: int | None) -> None:
        import wandb

        kept: dict[str, Any] = {"id": uuid.uuid4().hex[:8], "step": -1}
        if start is not None and self._file.exists():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
        settings = wandb.Settings(
            console="off",  # the terminal is the display's
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=INIT_S,
        )
        self._run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity or None,
            name=config.wandb.name or workdir.name,
            id=kept["id"],
            resume="allow",
            config=json.loads(to_json(config)),
            dir=workdir,
            mode="offline" if config.offline or not _signed_in(wandb.setup().settings) else None,
            settings=settings,
        )
        # The service knows what has reached it; without it only we do.
        self._last = kept["step"] if self._run.offline else self._run.step - 1
        self._id = kept["id"]
        self._keep()
        where = f"{workdir / 'wandb'}, for `wandb sync`" if self._run.offline else self._run.url
        self._say(f"Weights & Biases: {where}")

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Log a line of `metrics.jsonl`, unless the W&B run has its step already."""
        if self._run is None or step <= self._last:
            return

        def log() -> None:
            self._run.log({k: v for k, v in row.items() if k != "step"}, step=step, commit=True)
            self._last = step
            self._keep()

        self._try(log)

    def close(self, summary: Mapping[str, Any] | None = None, code: int = 0) -> None:
        """Hand over what is left.

        Args:
          summary: goes to the run's summary.
          code: 0: the command ended as it should.
        """
        run = self._run
        if run is None:
            return

        def finish() -> None:
            run.summary.update(dict(summary or {}))
            run.finish(exit_code=code)

        self._try(finish)
        self._run = None

    def _keep(self) -> None:
        write_atomic(self._file, json.dumps({"id": self._id, "step": self._last}) + "\n")

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of the library, the network or the service
            self._run = None
            line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._say(f"Weights & Biases: {line}; the run goes on without it")


def _signed_in(settings: Any) -> bool:
    """Whether there is a key for the service: without one the library would ask, and wait."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
        return known.authenticators(urlsplit(settings.base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
