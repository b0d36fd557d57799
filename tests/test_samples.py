"""Sample files: what they say of each token is what the loss was told, however rows are laid."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer_cases import write_hf

from kdrl_jax.data import load_tokenizer, token_pieces
from kdrl_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from kdrl_jax.objectives import METHODS
from kdrl_jax.rewards.functions import RewardFunctions
from kdrl_jax.rollout import DecodeStats
from kdrl_jax.sharding import make_mesh, put_batch, replicated
from kdrl_jax.training.batch import build_batch, rollout_rows
from kdrl_jax.training.collect import Collected
from kdrl_jax.training.packing import pack_rows
from kdrl_jax.training.samples import TokenTraces, asked_of, traced_slots, write_samples
from kdrl_jax.training.telemetry import split_kl
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, Problem, Rollouts, Scores, Verdict

P_, G, S, T = 4, 4, 5, 9
COUNT = 6
TEXT = "1 + 2 = 3"


class Pieces:
    """A tokenizer whose text is the numbers of its tokens."""

    def decode(self, ids) -> str:
        return "".join(f"<{i}>" for i in ids)

    def spell(self, ids) -> str:
        return "prompt " + self.decode(ids)


def rollouts() -> Rollouts:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, (P_, G)).astype(np.int32)
    lengths[0, 1] = T
    return Rollouts(
        prompt_tokens=rng.integers(3, 20, (P_, S)).astype(np.int32),
        prompt_lengths=rng.integers(1, S + 1, P_).astype(np.int32),
        tokens=rng.integers(3, 20, (P_, G, T)).astype(np.int32),
        log_probs=rng.normal(-2, 1, (P_, G, T)).astype(np.float32),
        lengths=lengths,
        finish_reason=np.where(lengths < T, FINISH_EOS, FINISH_LENGTH).astype(np.int32),
    )


REWARDS = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], np.float32)


def traces_of(sampled, teacher, *, packed: bool, mini: int, mesh):
    fill = functools.partial(
        build_batch,
        method=METHODS["kdrl"],
        aggregation="token-mean",
        kd_mask="response",
        scale="none",
        baseline="mean",
        overlong=(0, 1.0),
        mask_truncated=True,
        mask_final_eos=True,
        max_new_tokens=T,
        mini_batches=mini,
    )
    rows = rollout_rows(put_batch(mesh, sampled))
    if packed:
        rows = put_batch(mesh, pack_rows(sampled, mini_batches=mini, micro_batch=4 // mini * 2))
        laid = jax.jit(rows.packing.lay)(teacher.reshape(P_ * G, T))
    else:
        laid = teacher.reshape(P_ * G, T)
    scores = Scores(
        teacher_log_probs=put_batch(mesh, np.asarray(laid)),
        support=jnp.zeros((2, 2, 2), jnp.int32),  # nobody asks
    )
    trace = jax.jit(traced_slots(fill), static_argnums=6, out_shardings=replicated(mesh))
    with jax.set_mesh(mesh):
        given = (rows, put_batch(mesh, sampled), put_batch(mesh, REWARDS), asked_of(scores))
        return trace(*given, jnp.float32(0.3), None, COUNT)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mini", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_file_says_what_the_loss_is_told(packed, mini, shape, tmp_path):
    sampled = rollouts()
    teacher = np.random.default_rng(1).normal(-3, 1, (P_, G, T)).astype(np.float32)
    size = int(np.prod(shape))
    mesh = make_mesh(*shape, devices=jax.devices()[:size])
    traces = traces_of(sampled, teacher, packed=packed, mini=mini, mesh=mesh)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(traces))
    asked = [(Problem(f"p{p}", f"problem {p}", str(p)), [1, p]) for p in range(P_)]
    verdicts = [Verdict(float(r), "correct" if r else "wrong") for r in REWARDS.reshape(-1)]
    found = Collected(
        asked, sampled, lambda: verdicts, DecodeStats(), RewardFunctions(), lambda _: {}
    )
    path = tmp_path / "step_000001.jsonl"
    write_samples(path, found, COUNT, Pieces(), traces)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == COUNT
    for i, row in enumerate(rows):
        p, g = divmod(i, G)
        n, cut = sampled.lengths[p, g], sampled.finish_reason[p, g] == FINISH_LENGTH
        assert (row["id"], row["sample"], row["length"]) == (f"p{p}", g, n)
        assert (row["problem"], row["prompt"]) == (f"problem {p}", f"prompt <1><{p}>")
        assert row["finish_reason"] == ("length" if cut else "eos")
        assert "".join(row["tokens"]) == row["completion"]
        spelled = [f"<{t}>" for t in sampled.tokens[p, g, :n]]
        assert row["tokens"] == (spelled if cut else [*spelled[:-1], ""])
        np.testing.assert_allclose(row["log_probs"], sampled.log_probs[p, g, :n], atol=5.1e-5)
        expected = [*teacher[p, g, :n]] if cut else [*teacher[p, g, : n - 1], np.nan]
        given = [np.nan if x is None else x for x in row["teacher_log_probs"]]
        np.testing.assert_allclose(given, expected, atol=5.1e-5)
        advantage = REWARDS[p, g] - REWARDS[p].mean()
        assert row["advantage"] == pytest.approx(advantage, abs=5.1e-5)
        assert row["trained"] == (not cut)
        # Its end token is not the teacher's: of a response of nothing else there is nothing to say.
        assert row["distilled"] == (not cut and REWARDS[p, g] == 0 and n > 1)


def test_without_a_teacher(tmp_path):
    sampled = rollouts()
    zeros = np.zeros((COUNT, T), np.float32)
    found = Collected(
        [(Problem("p", "problem", "1"), [1])] * P_,
        sampled,
        lambda: [Verdict(0.0, "wrong")] * P_ * G,
        DecodeStats(),
        RewardFunctions(),
        lambda _: {},
    )
    traces = TokenTraces(zeros, zeros, zeros, None)
    write_samples(tmp_path / "a.jsonl", found, COUNT, Pieces(), traces)
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert row["teacher_log_probs"] is None
    assert not row["trained"]


# --- pieces of text -------------------------------------------------------------------------


def test_pieces_of_a_byte_level_tokenizer_join_to_the_text(tmp_path):
    """Random bytes too, of which most are no characters: as the tokenizer itself spells them."""
    write_hf(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("né 日本 👩‍👩‍👧 x")
    pieces = token_pieces(tokenizer, ids, tokenizer.decode(ids))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "né 日本 👩‍👩‍👧 x"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "" in pieces  # a character of several tokens is the last one's
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids = rng.integers(0, tokenizer.size, 40).tolist()
        text = tokenizer.decode(ids)
        assert "".join(token_pieces(tokenizer, ids, text)) == text


def test_pieces_of_sentencepiece_and_special_tokens():
    tokenizer = SentencePieceTokenizer.train("0123456789+= ")
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_id, *tokenizer.encode("4")]
    assert token_pieces(tokenizer, ids, TEXT + "4") == [*TEXT, "", "4"]
    assert token_pieces(tokenizer, [], "") == []


def test_text_that_is_no_sum_of_its_tokens_is_not_taken_apart():
    class Moody(Pieces):
        def decode(self, ids):
            return "".join(str(i) for i in sorted(ids))

    assert token_pieces(Moody(), [3, 1, 2], "123") is None


# --- KL by mask -----------------------------------------------------------------------------


def test_the_parts_of_the_kl_are_means_over_their_tokens():
    given = {"kl/teacher": 0.5, "kl/distilled_sum": 0.2, "kl/masked_sum": 0.3}
    given["kl/distilled_k2_sum"] = 0.1
    shares = {"kd/active_frac": 0.25, "kd/masked_frac": 0.75}
    found = split_kl(given | shares)
    expected = {"kl/teacher": 0.5, **shares, "kl/distilled": 0.8, "kl/masked": 0.4}
    expected["kl/distilled_k2"] = 0.4
    assert found == pytest.approx(expected)
    none = {"kd/active_frac": 1.0, "kd/masked_frac": 0.0}
    assert "kl/masked" not in split_kl(given | none)
    assert split_kl({"loss": 1.0}) == {"loss": 1.0}
