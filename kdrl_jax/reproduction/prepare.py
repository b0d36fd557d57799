"""What all cells share, made before them: teachers, and the warm-started student of each seed.

Cells then find these in `cache_dir`: no two processes train the same model, and a cell's wall time
is that of its method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kdrl_jax.config import split_variant
from kdrl_jax.data import prompt_lengths
from kdrl_jax.models import Decoder
from kdrl_jax.reproduction.grid import Cell, Grid
from kdrl_jax.reproduction.runner import Job, read_json
from kdrl_jax.rollout import RolloutEngine
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import eval_settings, eval_tokens, evaluate
from kdrl_jax.training.meshes import make_meshes
from kdrl_jax.training.problems import load_run_tokenizer, make_grader, read_run_data
from kdrl_jax.training.roles import build_role, check_roles
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.training.validation import validate

STUDENT, TEACHER = "student", "teacher"


def needs(cells: Sequence[Cell], task: str) -> dict[str, Cell]:
    """What cells of a task share, and one cell that has it.

    Returns:
      'teacher' or the name of its variant, and 'student SEED' for each warm start.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.task == task:
            config = cell.load()
            if validate(config).method.uses_teacher:
                found.setdefault(split_variant(cell.config)[1] or TEACHER, cell)
            if config.student.sft.steps:
                found.setdefault(f"{STUDENT} {cell.seed}", cell)
    return found


def prepare_jobs(grid: Grid, cells: Sequence[Cell], output: Path, only: str) -> list[Job]:
    """A process for each task of the cells; `only` selects them again in it."""
    module = (sys.executable, "-m", "kdrl_jax.reproduce")
    options = (f"--grid={grid.path}", f"--output={output}", f"--only={only}")
    return [
        Job(task, (*module, *options, f"--prepare={task}"), output / "prepared" / f"{task}.txt")
        for task in dict.fromkeys(cell.task for cell in cells)
    ]


def prepare(cells: Sequence[Cell], task: str, output: Path) -> None:
    """Make what a task needs; teachers' accuracies go to `output/prepared/TASK/TEACHER.json`."""
    display = Display()
    for name, cell in needs(cells, task).items():
        display.say(f"{task}: {name}")
        role, config = "student" if name.startswith(STUDENT) else "teacher", cell.load()
        sizes = validate(config)
        tokenizer = load_run_tokenizer(config)
        meshes = make_meshes(config)
        shapes = check_roles(config, sizes, tokenizer, meshes)
        mesh = meshes.student if role == "student" else meshes.teacher
        model = Decoder(shapes[role], config[role].dtype, config[role].remat)
        params = build_role(role, config, model, tokenizer, mesh, display)
        if role == "student":
            continue
        held_out = read_run_data(config, tokenizer, display).held_out
        engine = RolloutEngine(
            model,
            valid_vocab=tokenizer.size,
            prompt_buckets=prompt_lengths(
                config.data.prompt_buckets, config.data.max_prompt_tokens
            ),
            max_new_tokens=eval_tokens(config),
            slots=config.rollout.slots,
            mesh=meshes.rollout,
        )
        with make_grader(config, config.data.task) as grader:
            scores, _ = evaluate(
                engine,
                params,
                held_out,
                tokenizer,
                grader,
                **eval_settings(config),
            )
        write_atomic(output / "prepared" / task / f"{name}.json", json.dumps(scores) + "\n")
        display.say(f"{task}: held-out accuracy of the {name} {scores['eval/accuracy']:.3f}")


def teacher_accuracies(grid: Grid, output: Path) -> dict[str, dict[str, float]]:
    """Task → 'teacher' or variant → held-out accuracy, as far as they have been measured."""
    found: dict[str, dict[str, float]] = {}
    for task in grid.tasks:
        for path in sorted((output / "prepared" / task).glob("*.json")):
            scores = read_json(path) or {}
            found.setdefault(task, {})[path.stem] = round(scores["eval/accuracy"], 4)
    return found
