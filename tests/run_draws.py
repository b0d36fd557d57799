"""Runs on other devices: their samples against the weights that drew them, and each other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from draws import ROUNDING, Request, furthest

from kdrl_jax.config import saved_config
from kdrl_jax.data import load_tokenizer
from kdrl_jax.evaluation.model import find_policy, load_policy
from kdrl_jax.rollout import request_keys
from kdrl_jax.sharding import make_mesh
from kdrl_jax.training.display import Display
from kdrl_jax.training.problems import read_run_data

ALL = {"samples.every": 1, "samples.count": 1000, "checkpoint.every": 1, "checkpoint.keep": 100}
"""Changes to a config: what is drawn, and the weights that it is drawn by, stay in the folder."""


def samples_of(workdir: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of every step that has some."""
    files = sorted((Path(workdir) / "samples").iterdir())
    return {
        int(file.stem.split("_")[1]): [json.loads(line) for line in file.read_text().splitlines()]
        for file in files
    }


def assert_drawn_by_a_run(workdir: Path, start: Path) -> None:
    """What a run sampled lies, within rounding, where seed, step and problem have it.

    Args:
      workdir: of a run with `ALL`, one batch of prompts a step and one end token.
      start: the folder of its first weights.
    """
    config = saved_config(workdir / "config.json")
    tokenizer = load_tokenizer(workdir / "model")
    data = read_run_data(config, tokenizer, Display(quiet=True)).training
    places = {problem.id: (number, list(ids)) for number, (problem, ids) in enumerate(data)}
    mesh, (end,) = make_mesh(1, 1, 1, devices=jax.devices()[:1]), tokenizer.stop_ids
    texts = [tokenizer.decode([token]) for token in range(tokenizer.size)]
    for step, rows in samples_of(workdir).items():
        requests = []
        for row in rows:
            ended = row["finish_reason"] == "eos"
            pieces = row["tokens"][:-1] if ended else row["tokens"]
            if all(texts.count(piece) == 1 for piece in pieces):  # not of ids that show nothing
                tokens = [*map(texts.index, pieces), *[end] * ended]
                number, prompt = places[row["id"]]
                keys = request_keys(config.seed, step - 1, [number], config.rollout.group_size)
                key = np.asarray(jax.random.key_data(keys))[0, row["sample"]]
                requests.append(Request(prompt, tokens, row["log_probs"], key))
        assert 2 * len(requests) > len(rows) == config.rollout.prompts_per_step * len(keys[0])
        requests += requests[-1:] * (len(rows) - len(requests))  # one program for all steps
        policy = find_policy(start if step == 1 else workdir / "checkpoints" / str(step - 1))
        model, params, _ = load_policy(policy, mesh, "float32")
        temperature = config.rollout.temperature
        found = furthest(model, params, requests, tokenizer.size, temperature)
        assert max(found) <= ROUNDING, f"step {step}, {requests[int(np.argmax(found))]}"


def steps_in_common(found: Path, expected: Path) -> int:
    """The last step up to which two runs drew the same.

    From the first draw on that lies within rounding of a boundary they may be two runs.
    """
    one, other = samples_of(found), samples_of(expected)
    assert one.keys() == other.keys()
    words = ("id", "sample", "completion", "length", "finish_reason")
    for step in sorted(one):
        if [[row[k] for k in words] for row in one[step]] != [
            [row[k] for k in words] for row in other[step]
        ]:
            return step - 1
    return max(one)
