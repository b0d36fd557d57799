"""Models by name: what is fetched from a hub, from which commit, and every way it can fail."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from commands import HANG_S
from local_hub import LocalHub, tiny_model

import kdrl_jax
from kdrl_jax.config import load_config
from kdrl_jax.evaluation.model import find_policy
from kdrl_jax.models import hub as hub_module
from kdrl_jax.models.hub import Hub, hub_model_of, parse_hub_name
from kdrl_jax.models.hub_files import HubName
from kdrl_jax.planning.machines import parse_topology
from kdrl_jax.planning.run_plan import make_run_plan
from kdrl_jax.training.adapters import Base
from kdrl_jax.training.display import Display
from kdrl_jax.training.locate import fetch_models, find_model
from kdrl_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_thisisasecrettoken"
GIVEN = {"pytorch_model.bin": b"x" * 99, "modeling_own.py": b"raise SystemExit", "README.md": b"#"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    return {
        "whole": tiny_model(at / "whole", kind="qwen3", seed=1),
        "sharded": tiny_model(at / "sharded", kind="qwen2", sharded=True, seed=2),
    }


@pytest.fixture
def hub(monkeypatch, tmp_path, folders):
    with LocalHub() as hub:
        hub.here(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("kdrl_jax.models.hub_errors.time.sleep", lambda seconds: None)
        hub.add_model("Qwen/Small", folders["whole"], extra=GIVEN)
        hub.add_model("Qwen/Sharded", folders["sharded"], extra=GIVEN, tags=("v1",))
        yield hub


def fetch(*texts, **options):
    """Fetch models by name, with the keys a, b, …; the folders, and the lines that were printed."""
    lines = []
    names = {key: parse_hub_name(text) for key, text in zip("abcdef", texts, strict=False)}
    offline = options.pop("offline", False)
    models = Hub(offline=offline, say=lines.append).fetch(names, **options)
    return list(models.values()), lines


def refused(*texts, **options):
    with pytest.raises(UserError) as error:
        fetch(*texts, **options)
    return error.value.problems


def same_files(folder, original):
    names = [p.name for p in original.iterdir()]
    return all((folder / name).read_bytes() == (original / name).read_bytes() for name in names)


# --- Names --------------------------------------------------------------------------------------


def test_a_name_is_an_owner_and_a_repository():
    assert parse_hub_name("Qwen/Qwen3-0.6B") == HubName("Qwen/Qwen3-0.6B", "main")
    assert parse_hub_name("a/b@refs/pr/1") == HubName("a/b", "refs/pr/1")
    for text in ("", "a", "a/b/c", "/a/b", "a/b@", "../b", "a/..", "a b/c", "hf://a/b", "a/b@../c"):
        assert parse_hub_name(text) is None, text


def test_a_folder_of_that_name_wins(hub, tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    assert find_model("student.path", "Qwen/Small") == HubName("Qwen/Small")
    shutil.copytree(folders["sharded"], tmp_path / "Qwen" / "Small")
    assert find_model("student.path", "Qwen/Small") == Path("Qwen/Small")
    assert find_policy("Qwen/Small").folder == Path("Qwen/Small")
    assert not hub.requests


def test_the_first_of_several_that_is_there(tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    text = "runs/a or runs/b or Qwen/Small@v1"
    (tmp_path / "runs" / "a").mkdir(parents=True)  # nothing in it
    assert find_model("k", text) == HubName("Qwen/Small", "v1")
    shutil.copytree(folders["whole"], tmp_path / "runs" / "b")
    assert find_model("k", text) == Path("runs/b")


@pytest.mark.parametrize(
    "text", ["nowhere", "hf://Qwen/Small", "https://huggingface.co/Qwen/Small"]
)
def test_what_is_no_name_is_refused_with_the_key(text):
    with pytest.raises(UserError, match=r"^teacher\.path: .*OWNER/NAME"):
        find_model("teacher.path", text)


# --- What is fetched ----------------------------------------------------------------------------


def test_weights_config_and_tokenizer_and_nothing_else(hub, folders):
    (small, sharded), lines = fetch("Qwen/Small", "Qwen/Sharded@v1")
    for model, name in ((small, "whole"), (sharded, "sharded")):
        assert same_files(model.folder, folders[name])
        assert not set(GIVEN) & {p.name for p in model.folder.iterdir()}
        assert hub_model_of(model.folder) == model
    assert not any(name in path for _, path, _ in hub.requests for name in GIVEN)
    [line] = lines
    assert "downloading Qwen/Small 0." in line
    assert "are free" in line


def test_what_is_complete_is_not_asked_for_again(hub):
    [model], _ = fetch("Qwen/Small")
    before = len(hub.requests)
    assert fetch(str(model)) == ([model], [])
    assert len(hub.requests) == before  # the name has a commit
    assert fetch("Qwen/Small") == ([model], [])
    assert len(hub.requests) == before + 1  # which commit `main` is


def test_a_config_alone(hub):
    [model], _ = fetch("Qwen/Sharded", weights=())
    assert not list(model.folder.glob("*.safetensors"))
    [model], _ = fetch("Qwen/Sharded")
    assert len(list(model.folder.glob("*.safetensors"))) == 2


def test_a_branch_that_moves(hub, folders, tmp_path):
    [first], _ = fetch("Qwen/Small")
    hub.add_model("Qwen/Small", tiny_model(tmp_path / "new", kind="qwen3", seed=9))
    [second], _ = fetch("Qwen/Small")
    assert first.commit != second.commit
    assert same_files(first.folder, folders["whole"])
    lines = []
    display = Display(quiet=True)
    display.say = lines.append
    found = fetch_models({"a": "Qwen/Small"}, display, recorded={"a": str(first)})
    assert found == {"a": first.folder}  # a run goes on with what it began with


def test_offline_takes_the_cache_alone(hub):
    [line] = refused("Qwen/Small", offline=True)
    assert line.startswith("a: Qwen/Small: offline, and the cache ")
    assert "does not hold it; run once with a network" in line
    [model], _ = fetch("Qwen/Small")
    before = len(hub.requests)
    assert fetch("Qwen/Small", offline=True)[0] == [model]
    (model.folder / "model.safetensors").unlink()
    shutil.rmtree(model.folder.parent.parent / "kdrl_jax")
    [line] = refused("Qwen/Small", offline=True)
    assert "lacks model.safetensors of it" in line
    assert len(hub.requests) == before


def test_what_another_program_has_cached_is_taken(hub, folders):
    from huggingface_hub import snapshot_download

    snapshot_download("Qwen/Sharded")  # with everything
    before = len(hub.asked("*.safetensors", "GET"))
    [model], _ = fetch("Qwen/Sharded")
    assert len(hub.asked("*.safetensors", "GET")) == before
    assert same_files(model.folder, folders["sharded"])


def test_without_a_network_a_cached_branch_serves(hub):
    [model], _ = fetch("Qwen/Small")
    hub.fail("*", status=503, times=None)
    again, lines = fetch("Qwen/Small")
    assert again == [model]
    assert lines[-1] == "a: Qwen/Small: the hub answers 503; taken from the cache"


# --- What is refused, before any weights are fetched --------------------------------------------


def test_all_that_is_wrong_at_once(hub, folders, tmp_path):
    config = json.loads((folders["whole"] / "config.json").read_text())
    other = {"config.json": json.dumps(config | {"model_type": "mamba"}), "model.safetensors": b"x"}
    hub.add("model", "own/mamba", other)
    hub.add("model", "own/bin", {"config.json": json.dumps(config), "pytorch_model.bin": b"x"})
    hub.add("model", "own/lora", {"adapter_config.json": "{}"})
    hub.add("model", "own/gguf", {"a.gguf": b"x"})
    hub.add_dataset("own/data", {"a.jsonl": b"{}"})
    found = refused(
        *("Qwen/None", "Qwen/Small@v7", "own/data", "own/mamba", "own/bin", "own/lora"),
    )
    for line, said in zip(
        found,
        (
            "a: Qwen/None: there is no folder of that name, and the hub has no such model",
            "b: Qwen/Small@v7: no revision 'v7'",
            "c: own/data: is a data set and no model; as data write data.path=hf://own/data",
            "d: own/mamba: model_type",
            "e: own/bin: holds no model.safetensors, only pytorch_model.bin",
            "f: own/lora: holds adapters (PEFT) and no model",
        ),
        strict=True,
    ):
        assert line.startswith(said)
        assert ";" in line  # a remedy
    assert refused("own/gguf")[0].startswith("a: own/gguf: holds GGUF files alone")
    assert not hub.asked("*.safetensors")


def test_a_private_and_a_gated_model(hub, folders, monkeypatch, capfd):
    hub.add_model("own/private", folders["whole"], private=True, token=TOKEN)
    hub.add_model("own/gated", folders["whole"], gated=True, token=TOKEN)
    private, gated = refused("own/private", "own/gated")
    assert "or it is private; check the name; for a private one set HF_TOKEN" in private
    assert "its owner grants access on request; ask for it on the page of own/gated" in gated
    hub.tokens.add("hf_another")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    _, gated = refused("own/private", "own/gated")
    assert "grants access on request" in gated
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
    [line] = refused("own/gated")
    assert "does not accept the token (401); renew HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    models, lines = fetch("own/private", "own/gated")
    assert all(same_files(model.folder, folders["whole"]) for model in models)
    printed = "".join(capfd.readouterr()) + "".join(lines)
    assert TOKEN not in printed
    assert "hf_another" not in printed + private + gated


def test_a_disk_that_is_too_small(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    [line] = refused("Qwen/Small")
    assert "of disk are free, but Qwen/Small 0." in line
    assert "set HF_HOME" in line
    assert not hub.asked("*.safetensors")


def test_a_hub_that_refuses_or_fails(hub):
    for status, said in (
        (401, "does not accept the token (401)"),
        (403, "refuses access (403)"),
        (429, "too many requests (429); wait some minutes"),
        (500, "the hub answers 500; try again later"),
    ):
        hub.fail("*", status=status, times=None)
        [line] = refused("Qwen/Small")
        assert said in line
        hub.heal()


def test_a_hub_that_is_not_there(hub, monkeypatch, tmp_path):
    with LocalHub() as gone:
        gone.here(monkeypatch, tmp_path / "cache")
    lines = refused("Qwen/Small", "Qwen/Sharded")
    assert len(lines) == 2
    assert all("the hub is out of reach" in line and "check the network" in line for line in lines)


# --- What goes wrong on the way -----------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*/api/models/*", "*/config.json", "*.safetensors"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stumbles(hub, folders, pattern, status):
    hub.fail(pattern, status=status, times=2, headers={"Retry-After": "0"})
    [model], _ = fetch("Qwen/Small")
    assert same_files(model.folder, folders["whole"])


def test_a_connection_that_breaks(hub, folders):
    hub.cut("*.safetensors", after_bytes=1000, times=2)
    [model], _ = fetch("Qwen/Sharded")
    assert same_files(model.folder, folders["sharded"])


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_arrives_damaged_is_fetched_again(hub, folders, file):
    hub.corrupt(f"*/{file}", times=1)
    [model], lines = fetch("Qwen/Small")
    assert same_files(model.folder, folders["whole"])
    assert any(f"{file}: damaged on the way; downloading again" in line for line in lines)


def test_nothing_damaged_is_kept(hub, folders):
    hub.corrupt("*/model-00002-of-00002.safetensors")
    [line] = refused("Qwen/Sharded")
    assert "model-00002-of-00002.safetensors: the checksum is not the hub's, twice" in line
    cache = Hub().cache / "models--Qwen--Sharded"
    assert [p.name for p in cache.rglob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert refused("Qwen/Sharded", offline=True)
    hub.heal()
    [model], _ = fetch("Qwen/Sharded")
    assert same_files(model.folder, folders["sharded"])


def test_weights_that_were_damaged_in_the_cache(hub):
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download("Qwen/Small"))
    blob = (folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    [line] = refused("Qwen/Small")
    assert "model.safetensors: the checksum is not the hub's; delete" in line


def test_a_redirect_to_another_host_takes_no_token_along(hub, folders, monkeypatch):
    hub.add_model("own/private", folders["whole"], private=True, token=TOKEN)
    hub.redirect("*.safetensors")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    [model], _ = fetch("own/private")
    assert same_files(model.folder, folders["whole"])
    there = [headers for _, path, headers in hub.requests if "localhost" in headers.get("host", "")]
    assert there
    assert all("authorization" not in headers for headers in there)


FETCH = """
import sys
from kdrl_jax.models.hub import Hub, parse_hub_name
models = Hub(say=lambda line: print(line, flush=True)).fetch({"a": parse_hub_name(sys.argv[1])})
print(models["a"].folder, flush=True)
"""


def start(hub, cache, name):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, name],
        env=os.environ | hub.environment(cache) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_of_a_host_download_once(hub, tmp_path, folders):
    hub.slow("*.safetensors", delay_s=1.0)
    both = [start(hub, tmp_path / "cache", "Qwen/Sharded") for _ in range(2)]
    printed = [process.communicate(timeout=HANG_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert len(hub.asked("*.safetensors", "GET")) == 2  # each of the two files once
    assert len({out.splitlines()[-1] for out, _ in printed}) == 1
    assert same_files(Path(printed[0][0].splitlines()[-1]), folders["sharded"])


def test_a_download_that_was_killed_goes_on(hub, tmp_path, folders):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    hub.slow(f"*/{second}", delay_s=60.0)
    killed = start(hub, tmp_path / "cache", "Qwen/Sharded")
    root = tmp_path / "cache" / "hub" / "models--Qwen--Sharded"
    deadline = time.monotonic() + HANG_S
    while not list(root.glob(f"snapshots/*/{first}")):
        assert time.monotonic() < deadline, "the first file did not arrive"
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert refused("Qwen/Sharded", offline=True)  # half a model is none
    hub.heal()
    before = len(hub.asked(f"*/{first}", "GET"))
    [model], _ = fetch("Qwen/Sharded")
    assert same_files(model.folder, folders["sharded"])
    assert len(hub.asked(f"*/{first}", "GET")) == before  # it was there


# --- Where a folder is taken, a name is ---------------------------------------------------------


def test_a_policy_of_the_hub(hub, tmp_path):
    policy = find_policy("Qwen/Small", "--model")
    assert policy.name == "Small"
    assert str(policy).startswith("Qwen/Small@")
    assert policy.shape().qk_norm
    assert policy.tokenizer().size
    # Its digest names the commit, not the times of files.
    os.utime((policy.folder / "model.safetensors").resolve(), (1, 1))
    assert find_policy("Qwen/Small").digest() == policy.digest()


def test_convert_and_generate_take_names(hub, tmp_path, capsys):
    from kdrl_jax import convert, generate

    convert.main(["--to=orbax", "Qwen/Sharded@v1", str(tmp_path / "run")])
    generate.main(
        [
            *("--model=Qwen/Sharded", "--prompt=hello", "--max_new_tokens=3", "--json"),
            *("--beside", str(tmp_path / "run"), "--temperature=0", "--logprobs"),
        ]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [row["model"] for row in rows] == ["Sharded", "run"]
    ours, theirs = ([token["log_prob"] for token in row["log_probs"]] for row in rows)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_adapters_know_their_base_by_its_name(hub, tmp_path):
    """A run that trains adapters is read on another machine, whose cache lacks the base."""
    [model], _ = fetch("Qwen/Small")
    base = Base.of(model.folder)
    assert base.hub == str(model)
    assert base.found() == base
    elsewhere = dataclasses.replace(base, folder=tmp_path / "another_cache" / "gone")
    shutil.rmtree(Hub().cache)
    found = elsewhere.found()
    assert found.folder == model.folder
    found.require(tmp_path / "base.json")  # the content is that of `base`
    assert Base.of(tmp_path / "cache").hub == ""  # no model of the hub


def test_a_plan_reads_the_config_of_the_hub_and_else_the_shape(hub, monkeypatch, tmp_path):
    lines = []
    config = load_config("configs/stage2.py", {"student.path": "Qwen/Small"})
    machine = parse_topology("h100:8")
    plan = make_run_plan(config, machine, (), report=lines.append)
    # The student's is known, the teacher's is not there.
    assert [line.split(": ")[0] for line in lines] == ["teacher.path"]
    assert lines[0].endswith("planned with teacher.shape")
    assert not hub.asked("*.safetensors")
    small = load_config("configs/stage2.py", {"student.path": "Qwen/None"})
    larger = make_run_plan(small, machine, (), report=lambda line: None)
    assert plan.estimate.need("update") < larger.estimate.need("update")
    own = load_config("configs/base.py", {"student.path": "Qwen/None", "objective": "grpo"})
    with pytest.raises(UserError, match=r"student\.path: Qwen/None: there is no folder"):
        make_run_plan(own, machine, (), report=lambda line: None)


def test_bad_rows_are_found_before_weights_are_downloaded(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"has no answer"):
        kdrl_jax.train("mine", student="Qwen/Small", data=[{"problem": "1+1?"}] * 4, log="quiet")
    assert hub.asked("*/tokenizer.json")
    assert not hub.asked("*.safetensors")
