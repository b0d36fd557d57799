"""The local hub is what the installed clients take it for: `huggingface_hub` and `datasets`."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import httpx2
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, HfFileSystem, errors, hf_hub_download, snapshot_download
from local_hub import LocalHub, tiny_model
from safetensors.numpy import load_file

from kdrl_jax.data import load_tokenizer
from kdrl_jax.models import load_config, load_eos_ids, load_hf

NAME = "Qwen/Qwen2.5-3B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
EXTRA = {"pytorch_model.bin": b"pickle", "modeling_x.py": "import os", "onnx/fp16/m.onnx": b"o" * 9}
QUESTIONS = {"question": ["What is 2+3?", "What is 1+1?"], "answer": ["5", "2"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub for this process, with a cache of its own."""
    with LocalHub() as hub:
        hub.here(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def waited(monkeypatch):
    """The seconds between two tries, which are left out."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def model(hub, tmp_path):
    """NAME, at COMMIT; its files."""
    folder = tiny_model(tmp_path / "model")
    hub.add_model(NAME, folder, extra=EXTRA, commit=COMMIT, tags=("v1.0",))
    return folder


def contents(folder: Path | str) -> dict[str, bytes]:
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_snapshot_is_the_folder(hub, tmp_path, sharded):
    folder = tiny_model(tmp_path / "model", sharded=sharded)
    commit = hub.add_model(NAME, folder, extra=EXTRA)
    got = snapshot_download(NAME, allow_patterns=["*.json", "*.jinja", "*.safetensors"])
    assert Path(got).name == commit
    assert contents(got) == contents(folder)
    assert len(list(folder.glob("*.safetensors"))) == (2 if sharded else 1)
    assert hub.asked("*/config.json", "GET")
    assert not hub.asked("*.bin")
    assert not hub.asked("*.py")
    asked = len(hub.requests)
    assert snapshot_download(NAME, revision=commit, allow_patterns=["*.json"]) == got
    assert len(hub.requests) == asked, "what is there is not asked for again"


def test_the_small_models_load_and_share_a_tokenizer(tmp_path):
    vocabularies, prompts = set(), set()
    for kind in ("qwen2", "qwen3", "llama"):
        folder = tiny_model(tmp_path / kind, kind=kind, sharded=kind == "qwen3")
        model, params = load_hf(folder)
        assert model.config.max_positions == 40960
        assert load_eos_ids(folder) == (2, 0)
        vocabularies.add(model.config.vocab_size)
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
        prompt = tokenizer.chat([{"role": "user", "content": "What is 2+3?"}])
        prompts.add(tuple(prompt))
        tokens = jnp.asarray([prompt])
        inputs = tokens, jnp.arange(len(prompt))[None], jnp.ones_like(tokens)
        hidden = jax.jit(model.apply)(params, *inputs)
        assert np.isfinite(np.asarray(model.logits(params, hidden))).all()
    assert len(vocabularies) == len(prompts) == 1
    wide = tiny_model(tmp_path / "wide", tokenizer=tmp_path / "qwen2", vocabulary=512, seed=1)
    assert load_config(wide).vocab_size == 512 > vocabularies.pop()
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = (
        load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("qwen2", "wide")
    )
    assert not np.array_equal(first, second), "another seed, other weights"


def test_what_is_said_of_a_model(hub, model):
    api = HfApi()
    info = api.model_info(NAME, files_metadata=True)
    said = {s.rfilename: s for s in info.siblings}
    held = contents(model) | {k: v.encode() if isinstance(v, str) else v for k, v in EXTRA.items()}
    assert info.sha == COMMIT
    assert {name: s.size for name, s in said.items()} == {k: len(v) for k, v in held.items()}
    weights = held["model.safetensors"]
    assert said["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    config = held["config.json"]
    blob = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    assert said["config.json"].blob_id == blob
    assert api.model_info(NAME).siblings[0].size is None
    assert api.model_info(NAME, expand=["sha"]).siblings is None
    assert set(api.list_repo_files(NAME)) == set(held)
    assert api.get_paths_info(NAME, ["config.json", "onnx", "nowhere"])[0].size == len(config)
    assert [e.path for e in api.get_paths_info(NAME, ["onnx", "nowhere"])] == ["onnx"]
    assert [e.path for e in api.list_repo_tree(NAME, "onnx")] == ["onnx/fp16"]
    assert [e.path for e in api.list_repo_tree(NAME, "onnx/fp16")] == ["onnx/fp16/m.onnx"]
    assert next(api.list_repo_tree(NAME, "onnx", expand=True)).last_commit.oid == COMMIT
    planned = snapshot_download(NAME, dry_run=True)
    assert {f.filename: f.file_size for f in planned} == {k: len(v) for k, v in held.items()}
    assert all(f.will_download for f in planned)
    assert api.list_repo_refs(NAME).tags[0].target_commit == COMMIT
    assert api.list_repo_commits(NAME)[0].commit_id == COMMIT


def test_a_long_tree_comes_in_pages(hub):
    hub.page_size = 3
    files = {f"{i % 2}/{i}.txt": str(i) for i in range(10)}
    hub.add_model("owner/many", extra=files)
    assert sorted(HfApi().list_repo_files("owner/many")) == sorted(files)
    assert len(hub.asked("*/tree/*")) == 4  # ten files and two folders


def test_branches_tags_and_commits(hub, model, tmp_path):
    newer = tiny_model(tmp_path / "newer", seed=1)
    hub.add_model(NAME, newer, commit=OTHER)
    hub.add_model(NAME, model, commit="a" * 40, revision="a/branch")
    for revision, commit in {
        None: OTHER,
        "main": OTHER,
        "v1.0": COMMIT,
        COMMIT: COMMIT,
        "a/branch": "a" * 40,
    }.items():
        assert HfApi().model_info(NAME, revision=revision).sha == commit
        path = Path(hf_hub_download(NAME, "model.safetensors", revision=revision))
        assert commit in path.parts
        source = newer if commit == OTHER else model
        assert path.read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_cut_download_goes_on_where_it_was(hub, model, waited, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut("*/model.safetensors", after_bytes=10_500, times=2)
    got = hf_hub_download(NAME, "model.safetensors")
    assert Path(got).read_bytes() == (model / "model.safetensors").read_bytes()
    ranges = [h.get("range") for h in hub.asked("*/model.safetensors", "GET")]
    assert ranges == [None, "bytes=10000-", "bytes=20000-"]


def test_parts_of_a_file(hub, model):
    url = f"{hub.url}/{NAME}/resolve/main/config.json"
    whole = (model / "config.json").read_bytes()
    for asked, part in {"5-9": whole[5:10], "7-": whole[7:], "-4": whole[-4:]}.items():
        got = httpx2.get(url, headers={"Range": f"bytes={asked}"})
        assert (got.status_code, got.content) == (206, part)
        assert got.headers["Content-Range"].endswith(f"/{len(whole)}")
    assert httpx2.get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416
    with HfFileSystem(endpoint=hub.url).open(f"{NAME}@{COMMIT}/model.safetensors") as f:
        f.seek(100)
        assert f.read(50) == (model / "model.safetensors").read_bytes()[100:150]


def test_what_is_not_there(hub, model):
    hub.add_dataset("owner/data", {"train.jsonl": "{}"})
    for name in ("owner/nowhere", "owner/data"):
        with pytest.raises(errors.RepositoryNotFoundError):
            HfApi().model_info(name)
        with pytest.raises(errors.RepositoryNotFoundError):
            snapshot_download(name)
    with pytest.raises(errors.RevisionNotFoundError):
        snapshot_download(NAME, revision="v9")
    with pytest.raises(errors.RevisionNotFoundError):
        HfApi().model_info(NAME, revision=OTHER)
    with pytest.raises(errors.EntryNotFoundError):
        hf_hub_download(NAME, "nothing.json")
    with pytest.raises(errors.EntryNotFoundError):
        list(HfApi().list_repo_tree(NAME, "nowhere"))


def test_closed_repositories_open_to_their_token_alone(hub, model):
    hub.tokens.add("hf_stranger")
    hub.add_model("owner/gated", model, gated=True, token="hf_member")
    hub.add_model("owner/private", model, private=True, token="hf_member")
    assert HfApi().model_info("owner/gated").gated == "auto"
    for token, status in ((None, 401), ("hf_stranger", 403)):
        with pytest.raises(errors.GatedRepoError) as refused:
            hf_hub_download("owner/gated", "config.json", token=token)
        assert refused.value.response.status_code == status
    for token, status in ((None, 401), ("hf_stranger", 404)):
        with pytest.raises(errors.RepositoryNotFoundError) as refused:
            snapshot_download("owner/private", token=token)
        assert refused.value.response.status_code == status
    for name in ("owner/gated", "owner/private"):
        got = snapshot_download(name, token="hf_member")
        assert contents(got) == contents(model)
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials") as refused:
        HfApi().model_info(NAME, token="hf_expired")
    assert type(refused.value) is errors.HfHubHTTPError
    assert {h["authorization"] for h in hub.asked("*/owner/private*") if "authorization" in h} == {
        "Bearer hf_member",
        "Bearer hf_stranger",
    }


def test_failures_that_pass(hub, model, waited):
    hub.fail("*/model.safetensors", 429, times=2, headers={"Retry-After": "7"}, method="GET")
    hub.fail("*/tree/*", 503)
    got = snapshot_download(NAME, allow_patterns="*.safetensors")
    assert contents(got).keys() == {"model.safetensors"}
    assert waited == [1, 8.0, 8.0]  # the client adds a second to what it is told
    assert len(hub.asked("*/model.safetensors", "GET")) == 3


def test_failures_that_stay(hub, model, waited):
    hub.fail("/api/*", 500, times=None)
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download(NAME)
    with pytest.raises(errors.HfHubHTTPError) as said:
        HfApi().model_info(NAME)
    assert said.value.response.status_code == 500
    hub.heal()
    assert HfApi().model_info(NAME).sha == COMMIT


def test_a_wrong_byte_shows_in_the_sums_alone(hub, model):
    hub.corrupt("*/model.safetensors")
    got = snapshot_download(NAME, revision=COMMIT)
    bad, good = ((Path(f) / "model.safetensors").read_bytes() for f in (got, model))
    assert len(bad) == len(good)
    assert [i for i in range(len(good)) if bad[i] != good[i]] == [len(good) - 1]
    said = HfApi().verify_repo_checksums(NAME, revision=COMMIT)
    assert [m["path"] for m in said.mismatches] == ["model.safetensors"]


def test_a_slow_hub(hub, model):
    hub.slow("/api/*", delay_s=60)
    with pytest.raises(httpx2.ReadTimeout):
        HfApi().model_info(NAME, timeout=0.2)
    hub.slow("*/config.json", bytes_per_second=20_000)
    got = hf_hub_download(NAME, "config.json")
    assert Path(got).read_bytes() == (model / "config.json").read_bytes()


def test_a_redirect_to_another_host_takes_no_token_along(hub, model):
    hub.add_model(NAME, model, commit=COMMIT, private=True, token="hf_member")
    hub.redirect("*/model.safetensors")
    got = hf_hub_download(NAME, "model.safetensors", token="hf_member")
    assert Path(got).read_bytes() == (model / "model.safetensors").read_bytes()
    there = [h for h in hub.asked("*/model.safetensors") if h["host"].startswith("localhost")]
    here = [h for h in hub.asked("*/model.safetensors") if h not in there]
    assert len(there) == 1
    assert "authorization" not in there[0]
    assert {h["authorization"] for h in here} == {"Bearer hf_member"}


def test_a_redirect_to_another_hub(hub, model):
    with LocalHub() as mirror:
        mirror.add_model(NAME, model, commit=COMMIT)
        hub.redirect("*/config.json", to=mirror.url, times=1)
        hf_hub_download(NAME, "config.json")
        assert len(mirror.asked("*/config.json", "GET")) == 1
    assert not hub.asked("*/config.json", "GET")


def parquet() -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table(QUESTIONS), data)
    return data.getvalue()


def jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_datasets_at_a_revision(hub):
    rows = pa.table(QUESTIONS).to_pylist()
    files = {"data/test-00000-of-00001.parquet": parquet(), "README.md": "---\nlicense: mit\n---\n"}
    hub.add_dataset("owner/columns", files, commit=COMMIT)
    hub.add_dataset("owner/lines", {"train.jsonl": jsonl(rows)}, commit=COMMIT)
    hub.add_dataset("owner/lines", {"train.jsonl": jsonl(rows[:1])}, commit=OTHER)
    for name, split in (("owner/columns", "test"), ("owner/lines", "train")):
        found = datasets.load_dataset(name, split=split, revision=COMMIT)
        assert found.to_list() == rows
    newer = datasets.load_dataset("owner/lines", split="train", revision=OTHER)
    assert newer.to_list() == rows[:1]
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        datasets.load_dataset(NAME, revision=COMMIT)


def test_a_child_process_has_this_hub(hub, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    lines = jsonl([{"question": "1+1", "answer": "2"}])
    hub.add_dataset("owner/lines", {"train.jsonl": lines}, commit=OTHER)
    code = (
        "import datasets, huggingface_hub as h; "
        f"print(h.snapshot_download({NAME!r}, allow_patterns='*.json')); "
        f"print(datasets.load_dataset('owner/lines', split='train', revision={OTHER!r}).to_list())"
    )
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(cache, HF_HUB_DISABLE_PROGRESS_BARS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder, rows = done.stdout.splitlines()
    assert Path(folder).is_relative_to(cache)
    assert rows == "[{'question': '1+1', 'answer': '2'}]"
    assert not [h for _, _, h in hub.requests if "authorization" in h]


def test_a_hub_that_is_gone(hub, model, waited):
    hub.__exit__()
    with pytest.raises(httpx2.ConnectError):
        HfApi().model_info(NAME)
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download(NAME)
    hub._thread.join()
