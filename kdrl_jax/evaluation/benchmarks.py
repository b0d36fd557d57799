"""The benchmarks: where their problems are, how often each is asked and who judges.

Data of the user's own are asked likewise, under the name of their file; see `name_data`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kdrl_jax.data.problems import FIELDS, read_problems
from kdrl_jax.data.sources import HUB
from kdrl_jax.rewards import Grader
from kdrl_jax.tasks.knights_knaves import CLAUSES
from kdrl_jax.types import Problem, UserError

# Gold answers that are written as code or with a slip of the pen, as mathematics. The meaning is
# kept; the grader could only compare the left ones as strings, and so refused right answers.
RESPELLED: dict[str, dict[str, str]] = {
    "minerva_math": {
        "np.arcsin(10/13)": r"\arcsin(10/13)",
        "-1./3": "-1/3",
        "-3./2": "-3/2",
    },
    "olympiadbench": {
        r"m_{\max }=n^{2}-n-1": "n^{2}-n-1",
        r"\angle B E A_{1}=90,\angle A E B_{1}=90": "90, 90",
    },
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of problems with gold answers."""

    name: str
    title: str
    samples: int
    """Responses to each problem unless the user asks for another number: k of Avg@k."""
    hub: str
    """`owner/name` on the Hugging Face hub."""
    revision: str
    """Commit of the hub's repository; the default pins what is downloaded."""
    split: str = "test"
    config: str = ""
    """The hub's name for a part of the data set."""
    fields: tuple[str, str] = ("problem", "answer")
    """Columns of problem and answer on the hub. A local file has those of `FIELDS`."""
    file: str = ""
    """Name in a local folder; "": `{name}.jsonl`."""
    files: str = ""
    """Pattern of files in the hub's repository, which are read instead of a split."""
    task: str = ""
    """Whose verifier judges; "": answers are mathematics."""
    instruction: str = ""
    """What is added to each problem: the form of the answer that the task reads."""
    by: str = ""
    """See `eval.by`."""

    def source(self, data_dir: Path | None) -> str:
        """What `read_problems` reads: a file of `data_dir`, or if that is None the hub's."""
        if data_dir is not None:
            return str(data_dir / (self.file or f"{self.name}.jsonl"))
        if self.files:
            return f"hf://{self.hub}?file={self.files}&revision={self.revision}"
        config = f"&config={self.config}" if self.config else ""
        return f"hf://{self.hub}?split={self.split}{config}&revision={self.revision}"


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark(
            "aime24",
            "AIME24",
            16,
            "HuggingFaceH4/aime_2024",
            "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
            split="train",
        ),
        Benchmark(
            "aime25", "AIME25", 16, "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b"
        ),
        Benchmark(
            "math500",
            "MATH500",
            1,
            "HuggingFaceH4/MATH-500",
            "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        ),
        Benchmark(
            "amc23",
            "AMC23",
            16,
            "math-ai/amc23",
            "80815d37005feb82cd7f8fbc6901d5d3eff43057",
            fields=("question", "answer"),
        ),
        Benchmark(
            "minerva_math",
            "Minerva",
            1,
            "math-ai/minervamath",
            "ee46ddc498933b1977577953250ca5c66be64f96",
            fields=("question", "answer"),
        ),
        Benchmark(
            "olympiadbench",
            "OlympiadBench",
            1,
            "math-ai/olympiadbench",
            "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84",
            fields=("question", "final_answer.0"),
        ),
        Benchmark(
            "gsm8k",
            "GSM8K",
            1,
            "openai/gsm8k",
            "740312add88f781978c0658806c59bc2815b9866",
            config="main",
            fields=("question", "answer"),
            file="gsm8k_test.jsonl",
        ),
        Benchmark(
            "knights_knaves",
            "Knights and Knaves",
            1,
            "K-and-K/knights-and-knaves",
            "2f68547989981b1af37cb3dde5fdefa847aa8619",
            files="test/*.jsonl",
            fields=("quiz", "solution_text"),
            task="knights_knaves",
            instruction=CLAUSES,
            by="names",
        ),
    )
}


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name; `NAME@REVISION` takes another revision from the hub.

    Raises:
      UserError: an unknown name, with the nearest one, or a name given twice.
    """
    found: list[Benchmark] = []
    problems: list[str] = []
    for text in names:
        name, at, revision = text.partition("@")
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)[0]
            problems.append(
                f"--benchmarks: {name!r} is none of {', '.join(BENCHMARKS)}; the nearest is {near}"
            )
        elif name in [b.name for b in found]:
            problems.append(f"--benchmarks: {name} is given twice; name it once")
        elif at and not revision:
            problems.append(f"--benchmarks: {text!r} has no revision after the @; write a commit")
        else:
            chosen = BENCHMARKS[name]
            found.append(dataclasses.replace(chosen, revision=revision) if at else chosen)
    if problems:
        raise UserError(*problems)
    return found


def title_of(name: str) -> str:
    """Returns how a table calls a benchmark, or data of the user's own."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def name_data(paths: Sequence[str]) -> dict[str, str]:
    """Returns data sets of the user's own by their names: file, folder or name on the hub.

    One that is called like a benchmark gets 'own_' before its name, lest it be taken for that.

    Raises:
      UserError: two of one name.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for path in paths:
        stem = Path(path.partition("?")[0] if path.startswith(HUB) else path).stem
        name = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "data"
        name = f"own_{name}" if name in BENCHMARKS else name
        if name in found:
            problems.append(
                f"--data: {path} and {found[name]} would both be called {name!r}; rename a file, "
                "or evaluate them one after the other, with another --output"
            )
        found[name] = path
    if problems:
        raise UserError(*problems)
    return found


class Loaded(NamedTuple):
    """A benchmark's problems, and the rows that are none."""

    benchmark: Benchmark
    problems: list[Problem]
    bad: int
    listed: tuple[str, ...]
    """The first of these rows, with what is wrong."""
    note: str = ""
    """What else there is to say of what was read."""


def load_benchmark(benchmark: Benchmark, data_dir: Path | None = None) -> Loaded:
    """All problems of a benchmark, in its order, with the gold answers as the grader wants them.

    Args:
      data_dir: a folder with `{name}.jsonl`, rows of "id", "problem" and "answer"; None: the hub.

    Raises:
      UserError: no such file, no usable row in it, or no way to the hub.
    """
    columns = dict(zip(("problem", "answer"), benchmark.fields, strict=True))
    fields = FIELDS if data_dir else {"id": "id", **columns}
    problems, report = read_problems(benchmark.source(data_dir), fields, on_bad="drop")
    respelled = RESPELLED.get(benchmark.name, {})

    def gold(text: str) -> str:
        if "####" in text:  # GSM8K: a worked solution, then the number
            text = text.rpartition("####")[2].strip().replace(",", "")
        return respelled.get(text.replace("$", ""), text)

    added = f" {benchmark.instruction}" if benchmark.instruction else ""
    golds = [
        dataclasses.replace(p, problem=p.problem + added, answer=gold(p.answer)) for p in problems
    ]
    return Loaded(benchmark, golds, report.bad, report.listed)


def load_data(
    name: str, path: str, fields: Mapping[str, str], *, on_bad: str, samples: int
) -> Loaded:
    """Returns data of the user's own, read as those that a run trains on; see `read_problems`.

    Args:
      name: see `name_data`.
      samples: responses to each problem unless the command asks for another number.

    Raises:
      UserError: see `read_problems`.
    """
    problems, report = read_problems(path, fields, on_bad=on_bad)
    benchmark = Benchmark(name, name, samples, hub="", revision="")
    note = str(report) if report.unpinned or report.notes else ""
    return Loaded(benchmark, problems, report.bad, report.listed, note)


def refused_golds(problems: Sequence[Problem], grader: Grader) -> dict[int, str]:
    """The places of the problems whose own gold answer does not grade as correct, and why.

    One that the grader cannot read makes every response wrong, so the problem belongs in no
    average. What is tried is a response in the form that `grader` reads; see `Grader.grade_golds`.
    """
    verdicts = grader.grade_golds([p.answer for p in problems])
    return {
        i: f"{problem.id}: the gold answer {problem.answer!r} grades as {verdict.outcome}"
        for i, (problem, verdict) in enumerate(zip(problems, verdicts, strict=True))
        if not verdict.reward
    }
