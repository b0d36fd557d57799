"""Rollouts by a server: its protocol, its log-probs, its weights, and all that can go wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from commands import HANG_S, wait_until
from draws import Call, assert_drawn, requests_of
from local_server import LocalServer, NumpyDecoder
from test_rollout import BUCKET, EOS, LENGTH, MODEL, VALID, engine, left_padded, settings
from test_train import command, rows

from kdrl_jax import train
from kdrl_jax.cli import parse_config_args
from kdrl_jax.data import load_tokenizer
from kdrl_jax.models import Decoder, save_hf
from kdrl_jax.objectives import token_log_probs
from kdrl_jax.rollout import ServerEngine, request_keys
from kdrl_jax.rollout.dialects import Drawing, Request
from kdrl_jax.rollout.server import KINDS, seed_of
from kdrl_jax.rollout.server_check import Wanted, check_server, log_prob_kind
from kdrl_jax.rollout.transport import RETRIES, Ask, Server
from kdrl_jax.training.batch import rollout_rows
from kdrl_jax.training.meshes import make_meshes
from kdrl_jax.training.metrics import read_metrics
from kdrl_jax.training.problems import load_run_tokenizer
from kdrl_jax.training.roles import check_roles
from kdrl_jax.training.validation import compare_for_resume, validate
from kdrl_jax.types import FINISH_EOS, FINISH_LENGTH, UserError

BOTH = pytest.mark.parametrize("kind", ["vllm", "sglang"])


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(3))


@pytest.fixture(scope="module")
def other():
    """What a server has before it is given the student's weights."""
    return MODEL.init(jax.random.key(9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, other):
    folder = tmp_path_factory.mktemp("served") / "model"
    save_hf(folder, MODEL, other, eos_ids=(EOS,))
    return folder


def client(server, tmp_path, *, url="", timeout_s=HANG_S, concurrency=8, **changes):
    asked = Server(
        url or server.url, timeout_s=timeout_s, concurrency=concurrency, wait_s=0.01, key=server.key
    )
    return ServerEngine(
        asked,
        KINDS[server.kind]("student"),
        MODEL,
        weights=tmp_path / "weights",
        tokenizer_folder=None,
        **{
            "stop_ids": (EOS,),
            "valid_vocab": VALID,
            "prompt_buckets": (BUCKET, 16),
            "max_new_tokens": LENGTH,
        }
        | changes,
    )


def drawn(server, tmp_path, params, shape=(4, 3), keys=None, **changes):
    keys = request_keys(0, 5, range(shape[0]), shape[1]) if keys is None else keys
    sampling = settings(shape, **changes)
    return client(server, tmp_path).generate(params, left_padded(shape[0]), keys, sampling)


def trainer_log_probs(params, out, temperature=1.0):
    """[P, G, T] by the full forward pass that training uses."""
    batch = rollout_rows(out)
    hidden = MODEL.apply(params, *batch[:3])[:, -LENGTH - 1 : -1]
    log_probs, _ = token_log_probs(
        hidden,
        MODEL.head(params),
        batch.tokens[:, -LENGTH:],
        temperature=temperature,
        valid_vocab=VALID,
    )
    mask = np.arange(LENGTH) < out.lengths[..., None]
    return np.where(mask, np.asarray(log_probs).reshape(mask.shape), 0.0)


def test_the_local_server_computes_what_the_decoder_does(tmp_path, params):
    """It is an oracle only if it is right: against the decoder, which is tested by transformers."""
    save_hf(tmp_path / "m", MODEL, params)
    ids = [3, 7, 2, 11, 5]
    tokens = jnp.asarray([ids])
    hidden = MODEL.apply(params, tokens, jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
    np.testing.assert_allclose(
        NumpyDecoder(tmp_path / "m").logits(ids), MODEL.logits(params, hidden)[0, -1], atol=2e-5
    )


# --- what comes back ------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(kind, temperature, folder, tmp_path, params):
    with LocalServer(folder, kind) as server:
        out = drawn(server, tmp_path, params, temperature=temperature)
    expected = trainer_log_probs(params, out, temperature)
    assert (expected < 0).any()
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-5)
    assert out.tokens.max() < VALID  # of 16 rows that the output head has


@BOTH
def test_greedy_is_the_engines(kind, folder, tmp_path, params):
    keys = request_keys(0, 5, range(4), 1)
    with LocalServer(folder, kind) as server:
        out = drawn(server, tmp_path, params, (4, 1), temperature=0.0)
    own = engine().generate(params, left_padded(4), keys, settings((4, 1), temperature=0.0))
    for found in (out, own):
        requests = requests_of(found, keys)
        assert_drawn(MODEL, Call(params, requests, 0.0, {EOS}, [LENGTH] * 4), VALID)
        ends = [r.tokens[-1] == EOS for r in requests]
        np.testing.assert_array_equal(found.finish_reason[:, 0] == FINISH_EOS, ends)


@BOTH
def test_ends_and_limits(kind, folder, tmp_path, params):
    limits = np.random.default_rng(0).integers(1, LENGTH + 1, (6, 6)).astype(np.int32)
    limits[0, 0] = LENGTH + 50  # counts as LENGTH
    stops = (EOS, 5)
    sampling = dataclasses.replace(settings((6, 6), stops), max_new_tokens=jnp.asarray(limits))
    keys = request_keys(1, 2, range(6), 6)
    with LocalServer(folder, kind) as server:
        made = client(server, tmp_path, stop_ids=stops)
        out = made.generate(params, left_padded(6), keys, sampling)
    seen = set()
    for p, g in np.ndindex(6, 6):
        n, limit = out.lengths[p, g], min(limits[p, g], LENGTH)
        row = out.tokens[p, g]
        assert not np.isin(row[: n - 1], stops).any()
        assert not row[n:].any()
        assert (out.log_probs[p, g, :n] < 0).all()
        ended = row[n - 1] in stops  # at the limit too, whatever the server calls it
        assert out.finish_reason[p, g] == (FINISH_EOS if ended else FINISH_LENGTH)
        assert ended or n == limit
        seen.add((bool(ended), bool(n == limit)))
    assert seen == {(True, False), (True, True), (False, True)}
    prompts = left_padded(6).lengths[:, None]
    context = (out.lengths * prompts + out.lengths * (out.lengths - 1) // 2).sum()
    assert (made.last.tokens, made.last.context) == (out.lengths.sum(), context)
    assert made.last.steps == made.last.slot_steps == 0


@BOTH
def test_an_evaluation_may_be_longer_than_a_rollout(kind, folder, tmp_path, params):
    keys = request_keys(1, 2, range(3), 2)
    with LocalServer(folder, kind) as server:
        made = client(server, tmp_path, stop_ids=(), evaluation_tokens=LENGTH + 3)
        asked = {n: settings((3, 2), (), max_new_tokens=n) for n in (LENGTH, LENGTH + 3, 500)}
        found = {n: made.generate(params, left_padded(3), keys, s) for n, s in asked.items()}
    for n, out in found.items():
        most = min(n, LENGTH + 3)
        assert out.tokens.shape == (3, 2, most)
        assert (out.lengths == most).all()


@BOTH
def test_seeds_follow_from_the_keys(kind, folder, tmp_path, params):
    with LocalServer(folder, kind) as server:
        first, again = drawn(server, tmp_path, params), drawn(server, tmp_path, params)
        keys = request_keys(0, 6, range(4), 3)
        fresh = drawn(server, tmp_path, params, keys=keys)
        asked = [(b.get("seed") or b["sampling_params"]["sampling_seed"]) for b in server.asked]
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != fresh.tokens).any()
    assert len(set(asked)) == 2 * 12  # one for each request, and the same on repetition
    assert max(asked) < 2**63
    assert {seed_of(k) for k in jax.random.key_data(keys).reshape(12, -1)} <= set(asked)


def test_draws_follow_the_distribution(folder, tmp_path, params):
    """First tokens of one prompt, top-k 4, against the probabilities of the weights pushed."""
    shape, temperature = (1, 400), 0.8
    keys = request_keys(0, 0, [0], 400)
    with LocalServer(folder, "sglang") as server:
        out = client(server, tmp_path).generate(
            params,
            left_padded(1),
            keys,
            settings(shape, temperature=temperature, top_k=4, max_new_tokens=1),
        )
    prompt = left_padded(1)
    ids = prompt.tokens[0, -prompt.lengths[0] :].tolist()
    save_hf(tmp_path / "m", MODEL, params)
    logits = NumpyDecoder(tmp_path / "m").logits(ids)[:VALID] / temperature
    whole = np.exp(logits - logits.max())
    kept = np.sort(np.argsort(-whole)[:4])
    counts = np.bincount(out.tokens[0, :, 0], minlength=VALID)
    assert counts.sum() == counts[kept].sum() == 400
    expected = whole[kept] / whole[kept].sum() * 400
    assert scipy.stats.chisquare(counts[kept], expected).pvalue > 1e-3
    # Before truncation: they do not sum to one over what was kept.
    values = np.exp(out.log_probs[0, :, 0])
    np.testing.assert_allclose(values, (whole / whole.sum())[out.tokens[0, :, 0]], rtol=1e-4)


def test_equal_requests_are_asked_once(folder, tmp_path, params):
    keys = request_keys(0, 5, [0, 0, 1], 2)
    prompts = jax.tree.map(lambda x: x[[0, 0, 1]], left_padded(2))
    with LocalServer(folder) as server:
        made = client(server, tmp_path)
        finished = []
        out = made.generate(
            params, prompts, keys, settings((3, 2)), on_finished=lambda f: finished.extend(f)
        )
        assert len(server.asked) == 4
    np.testing.assert_array_equal(out.tokens[0], out.tokens[1])
    assert sorted(f.number for f in finished) == list(range(6))
    assert made.last.tokens == out.lengths[1:].sum()


def test_work_goes_on_while_requests_are_under_way(folder, tmp_path, params):
    """`meanwhile` once, with requests sent and none answered; results some at a time."""
    free = threading.Event()
    with LocalServer(folder, spoil=lambda answer: free.wait(HANG_S)) as server:
        made = client(server, tmp_path, concurrency=2)
        calls, finished = [], []

        def meanwhile():
            calls.append(threading.current_thread())
            wait_until(lambda: len(server.asked) >= 2, "two requests to be under way")
            assert (len(server.asked), finished) == (2, [])  # no more than may be in flight
            free.set()

        out = made.generate(
            params,
            left_padded(4),
            request_keys(0, 5, range(4), 3),
            settings((4, 3)),
            expected_lengths=[1.0, 9.0, 3.0, 2.0],
            meanwhile=meanwhile,
            on_finished=finished.append,
        )
        assert calls == [threading.main_thread()]
        first = [tuple(body["prompt"]) for body in server.asked[:2]]
    prompts = left_padded(4)
    longest = tuple(prompts.tokens[1, -prompts.lengths[1] :].tolist())
    assert first == [longest, longest]  # the longest first
    assert len(finished) > 1
    texts = {f.number: f.tokens for some in finished for f in some}
    assert sorted(texts) == list(range(12))
    for number, tokens in texts.items():
        p, g = divmod(number, 3)
        keep = out.lengths[p, g] - (out.finish_reason[p, g] == FINISH_EOS)
        np.testing.assert_array_equal(tokens, out.tokens[p, g, :keep])


# --- weights --------------------------------------------------------------------------------


@BOTH
def test_weights_are_pushed_when_they_change(kind, folder, tmp_path, params):
    nudged = jax.tree.map(lambda x: x + 0.05, params)
    with LocalServer(folder, kind) as server:
        made = client(server, tmp_path)
        args = left_padded(4), request_keys(0, 5, range(4), 3), settings((4, 3))
        made.generate(params, *args)
        made.generate(params, *args)  # the same: nothing to push
        assert len(server.loads) == 1
        out = made.generate(nudged, *args)
        made.generate(params, *args)
    first, second, third = server.loads
    assert first == third != second  # in turns
    np.testing.assert_allclose(out.log_probs, trainer_log_probs(nudged, out), atol=1e-5)
    assert np.abs(out.log_probs - trainer_log_probs(params, out)).max() > 0.01


def test_a_server_that_was_lost_is_given_weights_anew(folder, tmp_path, params):
    with LocalServer(folder) as server:
        made = client(server, tmp_path)
        args = left_padded(2), request_keys(0, 5, range(2), 1), settings((2, 1))
        made.generate(params, *args)
        insist = made.server.insist
        lost = []

        async def once_lost(http, ask):
            if not lost:
                lost.append(ask)
                made.server.losses += 1
            return await insist(http, ask)

        made.server.insist = once_lost
        made.generate(params, *args)
        made.generate(params, *args)
        made.generate(params, *args)
    assert len(server.loads) == 2


def test_weights_drawn_by_others_are_refused(folder, tmp_path, params):
    with (
        LocalServer(folder, "sglang", deaf=True) as server,
        pytest.raises(UserError, match="weights 'default', not by 'kdrl-1'"),
    ):
        drawn(server, tmp_path, params)


def test_a_folder_the_server_cannot_read(folder, tmp_path, params):
    with LocalServer(folder, "sglang") as server:
        server._load = lambda path: None
        made = client(server, tmp_path)
        post = server.post

        def elsewhere(path, body):  # the server's file system is another one
            if path == "/update_weights_from_disk":
                body = body | {"model_path": "/nowhere"}
            return post(path, body)

        server.post = elsewhere
        with pytest.raises(UserError, match=r"refused to load .*Failed to get weights iterator"):
            made.push(params)


# --- trouble --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_busy_server_is_asked_again(status, folder, tmp_path, params):
    with LocalServer(folder, errors=[status, status]) as server:
        out = drawn(server, tmp_path, params)
        assert len(server.asked) == 12 + 2
    np.testing.assert_allclose(out.log_probs, trainer_log_probs(params, out), atol=1e-5)


def test_a_server_that_stays_broken(folder, tmp_path, params):
    with (
        LocalServer(folder, errors=[503] * 1000) as server,
        pytest.raises(UserError) as error,
    ):
        drawn(server, tmp_path, params, (1, 1))
    assert len(server.asked) == RETRIES + 1
    assert len(error.value.problems) == 1
    for part in (server.url, "/v1/completions", "out of order", "run the same command again"):
        assert part in str(error.value)


def test_time_is_limited(folder, tmp_path, params):
    with LocalServer(folder, delay_s=5.0) as server:
        made = client(server, tmp_path)
        made.push(params)
        made.server.timeout_s = 0.3
        with pytest.raises(UserError, match=r"rollout\.server\.timeout_s=0\.3"):
            made.generate(params, left_padded(1), request_keys(0, 0, [0], 1), settings((1, 1)))


@BOTH
def test_a_server_that_dies(kind, folder, tmp_path, params):
    with LocalServer(folder, kind, die_at=5) as server:
        made = client(server, tmp_path, concurrency=2)
        with pytest.raises(UserError) as error:
            made.generate(params, left_padded(4), request_keys(0, 5, range(4), 3), settings((4, 3)))
    assert server.url in str(error.value)
    assert re.search(r"failed POST /\S+ 6 times", str(error.value))
    assert "run the same command again to continue" in str(error.value)


def test_nothing_stays_in_flight_when_the_caller_fails(folder, tmp_path, params):
    """An error of the caller's own ends the requests and comes through as it is."""
    with LocalServer(folder, delay_s=0.05) as server:
        made = client(server, tmp_path, concurrency=1)

        def fail():
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            made.generate(
                params,
                left_padded(4),
                request_keys(0, 5, range(4), 3),
                settings((4, 3)),
                meanwhile=fail,
            )
        assert len(server.asked) <= 2
        assert not [t for t in threading.enumerate() if t.name == "rollout server"]


def choice(answer):
    return answer["choices"][0]


SPOILT = {
    "no token ids": (lambda a: choice(a).pop("token_ids"), "return_token_ids"),
    "no log-probs": (lambda a: choice(a).update(logprobs=None), "no log-probs"),
    "a null": (lambda a: choice(a)["logprobs"]["token_logprobs"].__setitem__(0, None), "no log-p"),
    "too few": (lambda a: choice(a)["logprobs"]["token_logprobs"].pop(), "log-probs where at most"),
    "logits": (lambda a: choice(a)["logprobs"].update(token_logprobs=[9.0] * 12), None),
    "no choices": (lambda a: a.update(choices=[]), "not one of 'choices'"),
    "prompt cut": (lambda a: choice(a)["prompt_token_ids"].pop(0), "without prompt truncation"),
    "a reason": (lambda a: choice(a).update(finish_reason="tool_calls"), "'tool_calls'"),
    "unknown id": (lambda a: choice(a)["token_ids"].__setitem__(0, VALID), "that the tokenizer"),
    "trimmed": (lambda a: trim(choice(a)), "end token is missing"),
    "cut short": (lambda a: trim(choice(a), "length"), "longer context"),
    "aborted": (lambda a: choice(a).update(finish_reason="abort"), "finish reason 'abort'"),
}


def trim(c, reason="stop"):
    """Without its last token, as a server that hides the end of a text would answer."""
    c.update(token_ids=[2, 3, 4], finish_reason=reason)
    c["logprobs"]["token_logprobs"] = [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("name", SPOILT)
def test_answers_that_cannot_be_trained_on(name, folder, tmp_path, params):
    spoil, said = SPOILT[name]

    def at_full_length(answer):
        c = choice(answer)
        c["token_ids"] = [2] * LENGTH
        c["logprobs"]["token_logprobs"] = [-1.0] * LENGTH
        c["finish_reason"] = "length"
        spoil(answer)

    with (
        LocalServer(folder, spoil=at_full_length) as server,
        pytest.raises(UserError, match=said or "9.0 found where log-probs"),
    ):
        drawn(server, tmp_path, params, (1, 1))


def test_an_answer_that_is_whole_passes(folder, tmp_path, params):
    """What the cases above spoil is good as it is."""

    def at_full_length(answer):
        c = choice(answer)
        c["token_ids"], c["finish_reason"] = [2] * LENGTH, "length"
        c["logprobs"]["token_logprobs"] = [-1.0] * LENGTH

    with LocalServer(folder, spoil=at_full_length) as server:
        out = drawn(server, tmp_path, params, (1, 1))
    assert out.tokens.tolist() == [[[2] * LENGTH]]


def test_partial_rollouts_and_wrong_keys_are_refused(folder, tmp_path, params):
    with LocalServer(folder) as server:
        made = client(server, tmp_path)
        with pytest.raises(ValueError, match="begun"):
            made.generate(
                params, left_padded(2), request_keys(0, 0, [0, 1], 1), settings((2, 1)), enough=1
            )
        with pytest.raises(ValueError, match="request_keys"):
            made.generate(params, left_padded(2), request_keys(0, 0, [0], 1), settings((2, 1)))
        assert not server.asked


# --- the check at the start -----------------------------------------------------------------

PROMPTS = ((2, 3, 4), (5, 6), (7, 8, 9, 10), (11, 2))


class Letters:
    """As much of a tokenizer as the check asks for."""

    def encode(self, text):
        return [2 + ord(c) % 10 for c in text]


def checked(server, tmp_path, *, model="student", longest=100, texts=("one", "two"), **drawing):
    made = client(server, tmp_path)
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop_ids": (EOS,)}
    wanted = Wanted(model, longest, texts, PROMPTS)
    how = Drawing(**(plain | drawing), valid_vocab=VALID, vocab=MODEL.config.vocab_size)
    return check_server(made, wanted, how, Letters())


@pytest.mark.parametrize(
    ("kind", "mode", "found"),
    [
        ("vllm", "raw", "raw"),
        ("vllm", "processed", "cut"),
        ("sglang", "scaled", "scaled"),
        ("sglang", "raw", "raw"),
    ],
)
def test_kinds_of_log_probs_are_told_apart(kind, mode, found, folder, tmp_path):
    how = Drawing(0.6, 1.0, 0, 0.0, (EOS,), VALID, MODEL.config.vocab_size)
    with LocalServer(folder, kind, mode=mode) as server:
        assert log_prob_kind(client(server, tmp_path), PROMPTS, how) == found


@pytest.mark.parametrize(
    ("kind", "mode", "drawing", "refused"),
    [
        ("vllm", "raw", {}, ""),
        ("vllm", "processed", {}, ""),
        ("vllm", "processed", {"temperature": 0.6}, ""),
        ("vllm", "raw", {"temperature": 0.6}, "start it with --logprobs-mode processed_logprobs"),
        ("vllm", "raw", {"top_p": 0.9}, ""),
        ("vllm", "processed", {"top_p": 0.9}, "start it with --logprobs-mode raw_logprobs"),
        ("vllm", "processed", {"top_k": 5}, "--logprobs-mode raw_logprobs"),
        ("vllm", "raw", {"min_p": 0.1, "temperature": 0.6}, "rollout.top_p=1, top_k=0 and min_p=0"),
        ("vllm", "processed", {"top_p": 0.9, "temperature": 0.6}, "of the truncated distribution"),
        ("sglang", "scaled", {"temperature": 0.6, "top_p": 0.9, "top_k": 5}, ""),
        ("sglang", "raw", {"temperature": 0.6}, "SGLANG_RETURN_ORIGINAL_LOGPROB=0"),
    ],
    ids=str,
)
def test_log_probs_must_be_of_the_whole_distribution(
    kind, mode, drawing, refused, folder, tmp_path
):
    with LocalServer(folder, kind, mode=mode) as server:
        if not refused:
            checked(server, tmp_path, **drawing)
        else:
            with pytest.raises(UserError, match=re.escape(refused)):
                checked(server, tmp_path, **drawing)


def test_tokens_too_certain_to_tell(folder, tmp_path, params):
    """With an output head that names one token by far, nothing can be read off."""
    sure = jax.tree.map(np.array, jax.device_get(params))
    sure["lm_head"]["kernel"] = sure["lm_head"]["kernel"] * 1e4
    sure["lm_head"]["kernel"][VALID:] = 0  # no bias is a match for such logits
    save_hf(tmp_path / "sure", MODEL, sure, eos_ids=(EOS,))
    with LocalServer(tmp_path / "sure", mode="raw") as server:
        checked(server, tmp_path)
        with pytest.raises(UserError, match="do not show whether"):
            checked(server, tmp_path, temperature=0.6)


@BOTH
def test_what_a_server_must_be(kind, folder, tmp_path):
    encode = Letters().encode
    with LocalServer(folder, kind, encode=encode) as server:
        notes = checked(server, tmp_path)
        assert [line for line in notes if "seeds" in line] == notes
        assert bool(notes) == (kind == "sglang")
        with pytest.raises(UserError, match=r"rollout.server.model: 'mine' is none of 'student'"):
            checked(server, tmp_path, model="mine")
        server.max_model_len = 99
        server.encode = lambda text: [*encode(text)[:-1], 12]
        with pytest.raises(UserError) as error:
            checked(server, tmp_path)
    assert len(error.value.problems) == 2  # all at once
    assert "rollout.max_new_tokens: with the prompt up to 100 tokens" in error.value.problems[0]
    assert "another tokenizer" in error.value.problems[1]
    assert "token 2 of 'one' is [12]" in error.value.problems[1]


def test_a_tokenizer_that_cannot_be_asked_is_said(folder, tmp_path):
    with LocalServer(folder) as server:
        assert "its tokenizer was not compared (HTTP 404" in checked(server, tmp_path)[0]


def test_a_server_that_takes_no_weights(folder, tmp_path):
    with (
        LocalServer(folder, dev_mode=False) as server,
        pytest.raises(UserError, match=r"no /collective_rpc.*VLLM_SERVER_DEV_MODE=1"),
    ):
        checked(server, tmp_path)


def test_a_server_that_sglang_renamed_is_still_the_students(folder, tmp_path, params):
    with LocalServer(folder, "sglang") as server:
        client(server, tmp_path).push(params)
        assert server.name != "student"
        checked(server, tmp_path)


def test_keys(folder, tmp_path, params):
    with LocalServer(folder, key="secret") as server:
        drawn(server, tmp_path, params, (1, 1))
        made = client(server, tmp_path)
        made.server = Server(server.url, timeout_s=9.0, concurrency=1, wait_s=0.01)
        with pytest.raises(UserError, match="HTTP 401"):
            made.push(params)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://", "http://no.such.host.invalid"])
def test_nobody_there(url):
    server = Server(url, timeout_s=20.0, concurrency=1, wait_s=0.001)
    with pytest.raises(UserError, match=r"failed GET /v1/models 6 times, at last \w"):
        server.ask(Ask("GET", "/v1/models"))
    assert server.losses == RETRIES + 1


# --- configs --------------------------------------------------------------------------------


def demo(tmp_path, cache="cache", **changes):
    return parse_config_args(command(tmp_path / "run", tmp_path / cache, **changes), "test")[0]


def test_configs_that_cannot_work(tmp_path):
    changes = {
        "rollout.server.url": "localhost:8000",
        "rollout.carry": 2,
        "rollout.server.concurrency": 0,
        "rollout.server.timeout_s": 0.0,
    }
    with pytest.raises(UserError) as error:
        validate(demo(tmp_path, **changes))
    lines = "\n".join(error.value.problems)
    for key in ("rollout.server.url: 'localhost:8000'", "rollout.server.model: empty"):
        assert key in lines
    for key in ("rollout.carry: 2", "server.concurrency: 0", "server.timeout_s: 0.0"):
        assert key in lines
    assert len(error.value.problems) == 5
    sft = {"objective": "sft", "rollout.server.url": "http://a:1", "rollout.server.model": "m"}
    with pytest.raises(UserError, match="objective='sft' samples from the teacher"):
        validate(demo(tmp_path, **sft))
    validate(demo(tmp_path, **(sft | {"objective": "kdrl"})))
    with pytest.raises(UserError, match=r"rollout.server.kind: 'tgi'"):
        validate(demo(tmp_path, **{"rollout.server.kind": "tgi"}))


def test_a_run_may_go_on_with_another_server(tmp_path):
    before = json.loads(demo(tmp_path).to_json_best_effort())
    changes = {"rollout.server.url": "http://a:1", "rollout.server.model": "m"}
    compare_for_resume(before, demo(tmp_path, **changes), tmp_path / "config.json")


# --- whole runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a model of the demo's student's shape, and the tokenizer's encode."""
    where = tmp_path_factory.mktemp("demo")
    config = demo(where)
    tokenizer = load_run_tokenizer(config)
    shape = check_roles(config, validate(config), tokenizer, make_meshes(config))["student"]
    model = Decoder(shape)
    save_hf(where / "model", model, model.init(jax.random.key(1)), eos_ids=tokenizer.stop_ids)
    return where / "model", tokenizer.encode, tmp_path_factory.mktemp("cache")


def server_flags(server, **changes):
    return {
        "steps": 3,
        "rollout.server.url": server.url,
        "rollout.server.kind": server.kind,
        "rollout.server.model": "student",
        "rollout.server.concurrency": 4,
        "tis_cap": 2.0,
    } | changes


@BOTH
def test_a_run_with_a_server(kind, served, tmp_path, capsys):
    folder, encode, cache = served
    with LocalServer(folder, kind, encode=encode) as server:
        heat = {"rollout.temperature": 0.8}
        train.main(command(tmp_path / "run", cache, **server_flags(server, **heat)))
        # One for each step's weights, and those of the end for the last evaluation.
        assert len(server.loads) == 4
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for row in metrics[1:]:
        assert all(np.isfinite(v) for v in row.values()), row
        assert abs(row["mismatch/kl"]) < 1e-4
        assert "perf/slot_use" not in row
        assert row["tokens_per_s/rollout"] > 0
    assert [r["step"] for r in metrics if "eval/accuracy" in r] == [0, 3]
    assert load_tokenizer(tmp_path / "run" / "rollout_weights" / "0").encode("1+1") == encode("1+1")
    shown = capsys.readouterr().out
    assert f"rollouts by {kind} at {server.url}" in shown
    assert "tis_cap=2.0 corrects" not in shown


def test_a_server_that_did_not_load_shows_in_the_mismatch(served, tmp_path, capsys):
    folder, _, cache = served
    with LocalServer(folder, deaf=True) as server:
        flags = server_flags(server, **{"tis_cap": 0.0, "eval.every": 0})
        train.main(command(tmp_path / "run", cache, **flags))
    shown = rows(tmp_path / "run")
    assert min(row["mismatch/kl"] for row in shown) > 0.01
    assert "tis_cap=2.0 corrects" in capsys.readouterr().out


def test_a_run_goes_on_after_its_server_died(served, tmp_path):
    """With the numbers it would have had: the same weights and seeds draw the same."""
    folder, encode, cache = served
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quiet = {"eval.every": 0, "checkpoint.every": 1}
    with LocalServer(folder, encode=encode) as server:
        train.main(command(whole, cache, **server_flags(server, **quiet)))
        asked = len(server.asked)
    with (
        LocalServer(folder, encode=encode, die_at=asked - 3) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("asyncio.sleep", no_sleep)
        with pytest.raises(UserError, match="run the same command again to continue"):
            train.main(command(broken, cache, **server_flags(server, **quiet)))
    with LocalServer(folder, encode=encode) as server:
        train.main(command(broken, cache, **server_flags(server, **quiet)))
    for a, b in zip(rows(whole), rows(broken), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


async def no_sleep(seconds):
    """Instead of waiting between attempts."""


def test_a_server_that_will_not_do_is_refused_before_anything_is_made(served, tmp_path):
    folder, encode, cache = served
    with LocalServer(folder, encode=encode, mode="raw") as server:
        flags = server_flags(server, **{"rollout.temperature": 0.8})
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            train.main(command(tmp_path / "run", cache, **flags))
    assert not (tmp_path / "run").exists()


def test_seeds_have_63_bits():
    assert seed_of(np.array([2**32 - 1, 2**32 - 1], np.uint32)) == 2**63 - 1
    assert seed_of(np.array([0, 5], np.uint32)) == 5
    assert seed_of(np.array([1, 0], np.uint32)) == 2**32


def test_ids_that_mean_nothing_are_biased_away():
    drawing = Drawing(1.0, 1.0, 0, 0.0, (1,), 13, 16)
    body = KINDS["vllm"]("m").draw(Request((2, 3), 7, 4), drawing).body
    assert body["logit_bias"] == {"13": -100.0, "14": -100.0, "15": -100.0}
    body = KINDS["vllm"]("m").draw(Request((2, 3), 7, 4), drawing._replace(vocab=13)).body
    assert "logit_bias" not in body
