"""The server that a config has rollouts drawn by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from kdrl_jax.data import Tokenizer, prompt_lengths
from kdrl_jax.models import Decoder
from kdrl_jax.rollout import DRAWING, ServerEngine, sampling_params
from kdrl_jax.rollout.server import KINDS
from kdrl_jax.rollout.server_check import PROBES, Wanted, check_server
from kdrl_jax.rollout.transport import Server
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import EncodedProblem, eval_tokens
from kdrl_jax.types import UserError

KEY_VARIABLE = "KDRL_SERVER_KEY"
"""Environment variable with the server's API key: configs are written to disk."""


def connect(
    config: ConfigDict,
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[EncodedProblem],
    workdir: Path,
    display: Display,
) -> ServerEngine | None:
    """The engine of `rollout.server`, checked; None: rollouts are drawn in this process.

    Args:
      model: the student, in the dtype of rollouts.
      problems: of the run; the first few are used to probe the server.
      workdir: of the run; its `model/` will hold the tokenizer.

    Raises:
      UserError: the server does not answer or will not do; see `check_server`.
    """
    ro, asked = config.rollout, config.rollout.server
    if not asked.url:
        return None
    key = os.environ.get(KEY_VARIABLE, "")
    if not all("!" <= c <= "~" for c in key):  # an HTTP library would quote it in its error
        raise UserError(
            f"{KEY_VARIABLE}: holds a space, a line break or another character that no header "
            "takes; set it to the key alone"
        )
    engine = ServerEngine(
        Server(
            asked.url,
            timeout_s=asked.timeout_s,
            concurrency=asked.concurrency,
            key=key,
        ),
        KINDS[asked.kind](asked.model),
        model,
        weights=Path(asked.weights) if asked.weights else workdir / "rollout_weights",
        tokenizer_folder=workdir / "model",
        stop_ids=tokenizer.stop_ids,
        valid_vocab=tokenizer.size,
        prompt_buckets=prompt_lengths(config.data.prompt_buckets, config.data.max_prompt_tokens),
        max_new_tokens=ro.max_new_tokens,
        evaluation_tokens=eval_tokens(config) if config.eval.every else 0,
    )
    budget = max(ro.max_new_tokens, eval_tokens(config) if config.eval.every else 0)
    some = problems[:PROBES]
    wanted = Wanted(
        model=asked.model,
        longest=max(len(ids) for _, ids in problems) + budget,
        texts=[problem.problem for problem, _ in some],
        prompts=[ids for _, ids in some],
    )
    sampling = sampling_params((1, 1), tokenizer.stop_ids, **{k: ro[k] for k in DRAWING})
    for line in check_server(engine, wanted, engine.drawing(sampling), tokenizer):
        display.say(line)
    display.say(f"rollouts by {asked.kind} at {asked.url}, weights through {engine.weights}")
    if not config.tis_cap:
        display.say(
            "rollout.server: its kernels are not the trainer's, see mismatch/kl; tis_cap=2.0 "
            "corrects for that"
        )
    return engine
