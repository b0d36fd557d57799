"""Training, exporting and planning as functions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from kdrl_jax import convert
from kdrl_jax.api.common import Function, Log, Rows, config_of, refuse_others, speaking_as, text_of
from kdrl_jax.config import saved_config, update_config
from kdrl_jax.planning.machines import parse_topology
from kdrl_jax.planning.run_plan import PROGRAMS, RunPlan, make_run_plan
from kdrl_jax.rewards.functions import KEY as REWARDS
from kdrl_jax.train import train as run_training
from kdrl_jax.training.display import Display
from kdrl_jax.training.locate import fetch_models, recorded_models, used_keys, with_folders
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.problems import load_run_tokenizer
from kdrl_jax.training.roles import kept_folder
from kdrl_jax.training.rows import write_rows
from kdrl_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run has come to.

    Attributes:
      workdir: the run's folder. It is a model for `evaluate`, `generate`, `chat` and `export`, and
        for `student` or `teacher` of a further run.
      summary: the content of its summary.json.
    """

    workdir: Path
    summary: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps that have been made, those of earlier calls included."""
        return self.summary["steps"]

    @property
    def finished(self) -> bool:
        """Whether all steps have been made; else the same call goes on."""
        return self.summary["finished"]

    @property
    def accuracy(self) -> float | None:
        """Of held-out problems at the last evaluation; None without evaluations."""
        return self.summary.get("eval/accuracy/last")

    @property
    def accuracy_before(self) -> float | None:
        """Of held-out problems before the first step; None without evaluations."""
        return self.summary.get("eval/accuracy/first")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """An object for each step, as metrics.jsonl has them."""
        return read_metrics(self.workdir / "metrics.jsonl")

    @property
    def config(self) -> ConfigDict:
        """What the run was made with: the config with all changes."""
        return saved_config(self.workdir / "config.json")

    @property
    def start(self) -> Path | None:
        """The folder of the student as it began: its model's, or what a warm-up made of that; None
        where it began with random weights.
        """
        config = self.config
        folders = fetch_models(
            used_keys(config), Display(quiet=True), recorded=recorded_models(self.workdir)
        )
        config = with_folders(config, folders)
        if config.student.sft.steps:
            return kept_folder("student", config, load_run_tokenizer(config))
        return folders.get("student.path")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of the newest file of sample rollouts; [] if there is none."""
        files = sorted((self.workdir / "samples").glob("*.jsonl"))
        lines = files[-1].read_text(encoding="utf-8").splitlines() if files else []
        return [json.loads(line) for line in lines]


def train(
    config: str | Path | ConfigDict = "mine",
    workdir: str | Path | None = None,
    *,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    reward: Function | Sequence[Function] | None = None,
    prompt: Function | None = None,
    changes: Mapping[str, Any] | None = None,
    log: Log = "text",
    **others: Any,
) -> TrainResult:
    """Runs, or continues, a training run.

    Args:
      config: a file, the name of a shipped config, either with ':VARIANT', or a config.
      workdir: the run's folder; None: runs/ and the config's name.
      student, teacher: a folder, a run's folder, or OWNER/NAME[@REVISION] of the hub.
      data, eval_data: training and held-out problems. Rows in memory are written into the run's
        folder, so that the command continues the run too.
      reward: a function, or several: their values are the reward, and the verifier's verdict counts
        only if `changes` sets reward.verdict_weight. A function that another process can import is
        called in worker processes, which are killed beyond reward.timeout_s; any other, such as
        one of a notebook, in a thread of this process, which is left to itself beyond that.
      prompt: a prompt style, or a function from a problem's text to a text or messages.
      changes: values by key: {"steps": 20, "rollout.group_size": 8}.
      log: 'text' prints what the command prints, 'quiet' nothing.
      others: are refused, with the names that they have here.

    Returns:
      What the run has come to.

    Raises:
      UserError: before anything is loaded, one line for each problem.
    """
    refuse_others(others, "train")
    config, name = config_of(config)
    workdir = Path(workdir) if workdir is not None else Path("runs") / name
    own: dict[str, Any] = {}
    for key, path in (("student.path", student), ("teacher.path", teacher)):
        if path is not None:
            own[key] = str(path)
    if reward is not None:
        functions = reward if isinstance(reward, list | tuple) else [reward]
        own[REWARDS] = tuple(text_of(f, REWARDS) for f in functions)
        own["reward.verdict_weight"] = 0.0
    if prompt is not None:
        own["data.prompt_style"] = text_of(prompt, "data.prompt_style")
    with speaking_as(log):
        for key, rows in (("data.path", data), ("data.eval_path", eval_data)):
            if rows is not None:
                own[key] = write_rows(workdir, key, rows)
        if "data.path" in own:
            own["data.task"] = ""
        config = update_config(update_config(config, own), changes or {})
        summary = run_training(config, workdir)
    return TrainResult(workdir, summary)


def export(
    run: str | Path,
    output: str | Path,
    *,
    to: Literal["hf", "peft", "orbax"] = "hf",
    step: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    log: Log = "text",
) -> Path:
    """Writes a run's student as a Hugging Face folder, its adapters for PEFT, or a Hugging Face
    model as a run's folder.

    Args:
      run: a run's folder; for 'orbax' a Hugging Face folder or a model of the hub.
      output: a folder that must not exist, or be empty.
      step: which checkpoint; None: the newest.
      dtype: of the weights of 'hf'; None: that of the checkpoint.

    Returns:
      The folder that was written.

    Raises:
      UserError: no whole checkpoint there, or `output` is in use.
    """
    output = Path(output)
    with speaking_as(log):
        if to == "hf":
            convert.to_hf(Path(run), output, step, dtype)
        elif to == "peft":
            convert.to_peft(Path(run), output, step)
        elif to == "orbax":
            convert.to_orbax(str(run), output)
        else:
            raise UserError(f"to: {to!r} is none of 'hf', 'peft', 'orbax'")
    return output


def plan(
    config: str | Path | ConfigDict,
    topology: str,
    *,
    changes: Mapping[str, Any] | None = None,
    compiled: bool = False,
    log: Log = "quiet",
) -> RunPlan:
    """Returns what a run needs of each device of a machine, and how fast it can be.

    Args:
      config, changes: as of `train`.
      topology: of the machine: 'v5p-32', 'h100:8', ….
      compiled: also by the machine's compiler, where it is installed; takes minutes.

    Raises:
      UserError: an unknown machine, or a config that cannot work on it.
    """
    config, _ = config_of(config)
    with speaking_as(log):
        return make_run_plan(
            update_config(config, changes or {}),
            parse_topology(topology),
            PROGRAMS if compiled else (),
            report=(lambda line: None) if log == "quiet" else print,
        )
