"""The commands as functions, for notebooks and programs; `docs/python.md` is their page.

    import kdrl_jax

    result = kdrl_jax.train("mine", student="HuggingFaceTB/SmolLM2-135M-Instruct", data=rows,
                            reward=shorter, workdir="runs/first", changes={"steps": 20})
    kdrl_jax.chat(result.workdir).ask("What is 2 + 3?")

Each takes what its command takes, and also what only Python has: rows in memory, functions, values
instead of texts. Errors are `UserError`, one line for each problem, before anything is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from kdrl_jax import convert as _convert
from kdrl_jax import processes
from kdrl_jax.config import load_config, saved_config, split_variant, update_config
from kdrl_jax.evaluate import evaluate as _evaluate
from kdrl_jax.evaluation.benchmarks import find_benchmarks, load_benchmark, load_own
from kdrl_jax.evaluation.model import find_policy
from kdrl_jax.evaluation.planning import Refusals
from kdrl_jax.generation.opened import Opened, open_model
from kdrl_jax.generation.sampler import Answer
from kdrl_jax.own_functions import name_of
from kdrl_jax.planning.machines import parse_topology
from kdrl_jax.planning.run_plan import PROGRAMS, RunPlan, make_run_plan
from kdrl_jax.rewards.functions import KEY as REWARDS
from kdrl_jax.train import train as run
from kdrl_jax.training.display import Display, speaking
from kdrl_jax.training.locate import fetch_models, recorded_models, used_keys, with_folders
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.problems import load_run_tokenizer
from kdrl_jax.training.roles import kept_folder
from kdrl_jax.training.rows import write_rows
from kdrl_jax.training.run_weights import is_run, split_step
from kdrl_jax.types import UserError

Rows = str | Path | Iterable[Mapping[str, Any]]
"""A path as `data.path` takes it, or rows: a list of dicts, a `datasets.Dataset`, …"""
Function = str | Callable[..., Any]
"""A function, or 'module:function'."""
Log = Literal["text", "quiet"]

__all__ = [
    "Chat",
    "Completion",
    "EvaluationResult",
    "TrainResult",
    "UserError",
    "chat",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "plan",
    "train",
]


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
    def start(self) -> Path | None:
        """The folder of the student as it began: its model's, or what a warm-up made of that; None
        where it began with random weights.
        """
        config = saved_config(self.workdir / "config.json")
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

    Returns:
      What the run has come to.

    Raises:
      UserError: before anything is loaded, one line for each problem.
    """
    config, name = _config(config)
    workdir = Path(workdir) if workdir is not None else Path("runs") / name
    own: dict[str, Any] = {}
    for key, path in (("student.path", student), ("teacher.path", teacher)):
        if path is not None:
            own[key] = str(path)
    if reward is not None:
        functions = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
        own[REWARDS] = tuple(_text(f, REWARDS) for f in functions)
        own["reward.verdict_weight"] = 0.0
    if prompt is not None:
        own["data.prompt_style"] = _text(prompt, "data.prompt_style")
    with _speaking(log):
        for key, rows in (("data.path", data), ("data.eval_path", eval_data)):
            if rows is not None:
                own[key] = write_rows(workdir, key, rows)
        if "data.path" in own:
            own["data.task"] = ""
        config = update_config(update_config(config, own), changes or {})
        summary = run(config, workdir)
    return TrainResult(workdir, summary)


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has come to.

    Attributes:
      output: the folder with every response, results.json and results.md.
      results: the content of results.json.
    """

    output: Path
    results: dict[str, Any]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right responses by benchmark, from 0 to 1."""
        return {name: x["avg"] for name, x in self.results["benchmarks"].items()}

    @property
    def table(self) -> str:
        """The results as Markdown."""
        return (self.output / "results.md").read_text(encoding="utf-8")

    def responses(self, name: str) -> list[dict[str, Any]]:
        """Every response to a benchmark's problems, with its verdict."""
        lines = (self.output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def evaluate(
    model: str | Path,
    output: str | Path,
    *,
    benchmarks: Sequence[str] = (),
    data: Rows | None = None,
    data_dir: str | Path | None = None,
    config: str | Path | ConfigDict | None = None,
    samples: int | None = None,
    limit: int | None = None,
    changes: Mapping[str, Any] | None = None,
    log: Log = "text",
) -> EvaluationResult:
    """Asks a model problems and grades its answers. The same call goes on where it was interrupted.

    Args:
      model: a run's folder, RUN/checkpoints/STEP, a Hugging Face folder, or OWNER/NAME of the hub.
      output: the folder of the results.
      benchmarks: 'math500', 'aime24', …; see `python -m kdrl_jax.evaluate --help`.
      data: problems of one's own, beside or instead of benchmarks.
      data_dir: a folder with the benchmarks' files; None: they come from the hub.
      config, changes: how answers are asked for and graded; None: the run's own config, or 'mine'.
      samples: answers to each problem; None: 1 of one's own, else the benchmark's.
      limit: the first so many problems of each; None: all.
      log: 'text' or 'quiet'.

    Raises:
      UserError: before weights are loaded, one line for each problem.
    """
    output = Path(output)
    with _speaking(log):
        wrong = Refusals()
        if not benchmarks and data is None:
            wrong.append("benchmarks: empty, and no data; give one of them")
        known = wrong.attempt(_evaluation_config, model, config, changes)
        policy = wrong.attempt(find_policy, model, "model", display=Display())
        folder = Path(data_dir) if data_dir else None
        chosen = wrong.attempt(find_benchmarks, list(benchmarks)) or []
        loaded = [x for b in chosen if (x := wrong.attempt(load_benchmark, b, folder))]
        if data is not None and known is not None:
            path = wrong.attempt(write_rows, output, "data", data)
            own = wrong.attempt(load_own, path, known.data.fields) if path else None
            loaded += [own] if own else []
        wrong.raise_any()
        assert known is not None
        assert policy is not None
        results = _evaluate(known, policy, loaded, output, samples=samples, limit=limit)
    return EvaluationResult(output, results)


def _evaluation_config(
    model: str | Path, config: str | Path | ConfigDict | None, changes: Mapping[str, Any] | None
) -> ConfigDict:
    saved = split_step(Path(model))[0] / "config.json"
    own = config is None and is_run(saved.parent) and saved.is_file()
    found = saved_config(saved) if own else _config(config or "mine")[0]
    return update_config(found, changes or {})


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
      drawing: max_new_tokens, temperature, top_p, top_k, min_p; default: the run's, else 1024
        tokens at temperature 0.6.

    Raises:
      UserError: no such model, values out of range, or a prompt that does not fit.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    opened = open_model(
        model,
        dtype=dtype,
        prompt_style=None if prompt_style is None else _text(prompt_style, "data.prompt_style"),
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


def _answers(opened: Opened, texts: Sequence[str], start: int) -> list[Answer]:
    prompts = [opened.encode(text, f"prompts[{start + i}]") for i, text in enumerate(texts)]
    numbers = range(start, start + len(texts))
    return opened.sampler.answer(prompts, numbers)[0]


class Chat:
    """A conversation with a model; made by `chat`.

    Attributes:
      messages: all that was said, as a chat template takes it.
    """

    def __init__(self, opened: Opened):
        self._opened, self._turn = opened, 0
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
        tell = None if on_text is None else lambda request, piece: on_text(piece)
        [answer] = self._opened.sampler.answer([ids], [0], turn=self._turn, on_text=tell)[0]
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
    **drawing: float,
) -> Chat:
    """Returns a conversation with a model; arguments as of `generate`."""
    style = None if prompt_style is None else _text(prompt_style, "data.prompt_style")
    return Chat(
        open_model(model, dtype=dtype, prompt_style=style, seed=seed, drawing=drawing, live=True)
    )


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
    with _speaking(log):
        if to == "hf":
            _convert.to_hf(Path(run), output, step, dtype)
        elif to == "peft":
            _convert.to_peft(Path(run), output, step)
        elif to == "orbax":
            _convert.to_orbax(str(run), output)
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
    config, _ = _config(config)
    with _speaking(log):
        return make_run_plan(
            update_config(config, changes or {}),
            parse_topology(topology),
            PROGRAMS if compiled else (),
            report=(lambda line: None) if log == "quiet" else print,
        )


def _config(config: str | Path | ConfigDict) -> tuple[ConfigDict, str]:
    """A config, and a name for its run."""
    if isinstance(config, ConfigDict):
        return config, "python"
    file, variant = split_variant(config)
    name = "-".join([file.stem, *variant.split(",")]) if variant else file.stem
    return load_config(config), name


def _text(function: Any, key: str) -> str:
    """How a config writes a function or (function, weight)."""
    if isinstance(function, str):
        return function
    if isinstance(function, tuple) and len(function) == 2:
        return f"{_text(function[0], key)}*{function[1]}"
    return name_of(function, key)


@contextlib.contextmanager
def _speaking(log: str) -> Iterator[None]:
    if log not in ("text", "quiet"):
        raise UserError(f"log: {log!r} is none of 'text', 'quiet'")
    processes.start(None)
    with speaking(log):
        yield
