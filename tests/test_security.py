"""What must never run, be read or be told: by the source, by hostile folders, by a run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading

import model_cases as cases
import pytest
import tokenizer_cases
from commands import xla_flags
from local_server import LocalServer
from test_config import SHIPPED
from test_train import TINY, command

from kdrl_jax import train
from kdrl_jax.cli import run_entry
from kdrl_jax.config import ROOT, apply_overrides, flatten, load_config
from kdrl_jax.data import HFTokenizer, hf_tokenizer, load_tokenizer, read_problems
from kdrl_jax.evaluation.benchmarks import BENCHMARKS
from kdrl_jax.models import load_hf
from kdrl_jax.training.metrics import lock_folder, unlock_folder
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.training.validation import validate
from kdrl_jax.types import UserError

# --- the source ----------------------------------------------------------------------------------

FILES = sorted(
    f
    for room in ("kdrl_jax", "configs", "launch", "benchmarks")
    for f in (ROOT / room).rglob("*.py")
)
PICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {
    *("eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
    *("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"),
    *("tempfile.mktemp", "runpy.run_path", "runpy.run_module"),
}
ALLOWED = {
    # The user's own config is a Python file that the user names on the command line.
    ("kdrl_jax/config.py", "exec_module"),
}


def offences(path: str, source: str) -> list[str]:
    """What a file does that no file may, as 'path:line: what'."""
    found = []

    def add(node: ast.AST, what: str) -> None:
        if (path, what) not in ALLOWED:
            found.append(f"{path}:{getattr(node, 'lineno', 0)}: {what}")

    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in PICKLERS:
                add(node, f"import {name}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            add(node, called)
        if called.rpartition(".")[2] == "exec_module":
            add(node, "exec_module")
        options = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        last, first = called.rpartition(".")[2], called.split(".")[0]
        loads = last == "load" and first in ("np", "numpy")
        pretrained = "Auto" in called and last == "from_pretrained"
        renders = last in ("Environment", "Template") and "jinja" in source
        for name, good, must in (
            ("allow_pickle", "False", loads),
            ("trust_remote_code", "False", pretrained),
            ("autoescape", "True", renders),
            ("shell", "False", False),
        ):
            if options.get(name, "" if must else good) != good:
                add(node, f"{called}, {name} not {good}")
        if called.rpartition(".")[2] in ("extractall", "unpack_archive"):
            add(node, called.rpartition(".")[2])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_or_unpickles_what_it_reads(path):
    assert offences(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import torch; torch.load('x')",
        "eval(answer)",
        "exec(text)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoTokenizer.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "import jinja2; jinja2.Environment()",
        "spec.loader.exec_module(module)",
        "tar.extractall()",
    ],
)
def test_the_scan_finds(line):
    assert len(offences("kdrl_jax/new.py", line)) == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_hub_addresses_are_pinned(name):
    for key, value in flatten(load_config(ROOT / "configs" / name)).items():
        if isinstance(value, str) and value.startswith("hf://"):
            assert re.search("[?&]revision=[0-9a-f]{40}(&|$)", value), f"{key}={value}"


def test_benchmarks_are_pinned():
    assert all(re.fullmatch("[0-9a-f]{40}", b.revision) for b in BENCHMARKS.values())


# --- hostile models ------------------------------------------------------------------------------


def hostile_template(tmp_path, template: str) -> HFTokenizer:
    folder = tokenizer_cases.write_hf(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert folder is None or folder
    return HFTokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch SENTINEL').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('touch SENTINEL') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'x' * 10 ** 8 }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{% include '/etc/passwd' %}",
        "{% for m in %}",
        "{{ ('%' ~ 's') | format }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_chat_templates_are_refused(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    tokenizer = hostile_template(tmp_path, template)
    with pytest.raises(UserError) as caught:
        tokenizer.chat([{"role": "user", "content": "q"}])
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path / 'model'}: the chat template fails: ")
    assert len(line) < 600
    assert not (tmp_path / "SENTINEL").exists()


def test_a_template_without_an_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tokenizer, "TEMPLATE_S", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = hostile_template(tmp_path, loop)
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(UserError, match=r"template fails: TooLong not done after 0\.3 s; mend it"):
        tokenizer.chat([{"role": "user", "content": "q"}])


def test_code_in_a_model_folder_is_not_run(tmp_path, monkeypatch):
    """Nor does anybody wait for an answer on standard input."""
    folder = tmp_path / "model"
    tokenizer_cases.write_hf(folder)
    sentinel = tmp_path / "sentinel"
    (folder / "evil.py").write_text(
        f"open({str(sentinel)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    auto = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": auto, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    load_tokenizer(folder)  # by its tokenizer.json alone
    (folder / "tokenizer.json").rename(folder / "other.json")
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="unreadable tokenizer"):
        load_tokenizer(folder)
    assert not sentinel.exists()
    assert "evil" not in sys.modules


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


OFFSETS = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":%s}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(b"{}", 2**63),
        header(b"{}", 2**64 - 1),
        header(b"[" * 100_000),
        header(b"\xff\xfe{}"),
        header(OFFSETS.replace("%s", '{"dtype":"F32","shape":[2],"data_offsets":[4,12]}').encode())
        + b"x" * 12,
        header(OFFSETS.replace("%s", '{"dtype":"F99","shape":[2],"data_offsets":[8,16]}').encode())
        + b"x" * 16,
        header(OFFSETS.replace("%s", '{"dtype":"F32","shape":[2],"data_offsets":[16,8]}').encode())
        + b"x" * 16,
        header(
            OFFSETS.replace(
                "%s", '{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[8,16]}'
            ).encode()
        )
        + b"x" * 16,
        b"\x80\x04\x95" + b"pickle",
    ],
    ids=range(11),
)
def test_hostile_safetensors_are_refused_by_name(tmp_path, content):
    folder = cases.write_folder(tmp_path / "model", cases.CASES["qwen3_tied"])
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: unreadable \("):
        load_hf(folder)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../model.safetensors"}, "lies outside the folder"),
        ({"a": "/etc/passwd"}, "lies outside the folder"),
        ({"a": "x\0.safetensors"}, "lies outside the folder"),
        ({"a": "C:\\x.safetensors"}, "lies outside the folder"),
        ({"a": ""}, "lies outside the folder"),
        ({"a": 3}, "3 is no file's name"),
        ({"a": ["model.safetensors"]}, "is no file's name"),
        (["model.safetensors"], "weight_map is no object"),
        ({"a": "pytorch_model.bin"}, r"is no \.safetensors"),
    ],
)
def test_hostile_indexes_are_refused(tmp_path, weight_map, said):
    folder = cases.write_folder(tmp_path / "model", cases.CASES["qwen3_tied"])
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=said):
        load_hf(folder)


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "hf://owner/..",
        "hf://../name",
        "hf://owner/../../etc",
        "hf://owner/name?file=../../etc/*",
        "hf://owner/name?file=/etc/*.json",
        "hf://owner/name?file=a/../../*.jsonl",
        "hf://owner\\x/name",
    ],
)
def test_hub_addresses_stay_in_their_data_set(url):
    with pytest.raises(UserError, match=r"refused|is no data set"):
        read_problems(url)


SECRET = "s3cr3t-0123456789"


@pytest.mark.parametrize(
    ("key", "value", "variable"),
    [
        ("rollout.server.url", f"http://user:{SECRET}@host:8000", "KDRL_SERVER_KEY"),
        ("rollout.server.url", f"http://{SECRET}@host:8000", "KDRL_SERVER_KEY"),
        ("rollout.server.url", f"https://host/?api_key={SECRET}", "KDRL_SERVER_KEY"),
        ("rollout.server.url", f"ftp://user:{SECRET}@host", "KDRL_SERVER_KEY"),
        ("data.path", f"hf://owner/name?token={SECRET}", "HF_TOKEN"),
        ("data.eval_path", f"hf://me:{SECRET}@owner/name", "HF_TOKEN"),
        ("student.path", f"s3://bucket/x?X-Amz-Signature=1&access_token={SECRET}", "environment"),
    ],
)
def test_secrets_in_configs_are_refused_and_not_repeated(key, value, variable, capsys, tmp_path):
    settings = {key: value, "rollout.server.model": "m", "objective": "sft"}
    argv = command(tmp_path / "run", tmp_path / "cache", **settings)
    with pytest.raises(SystemExit) as end:
        run_entry(lambda: train.main(argv))
    printed = "".join(capsys.readouterr())
    assert end.value.code == 2
    (line,) = [x for x in printed.splitlines() if "configs are written to disk" in x]
    assert line.startswith(f"error: {key}: ")
    assert variable in line
    assert SECRET not in printed
    assert not (tmp_path / "run").exists()


def test_ordinary_addresses_hold_no_secret():
    good = [
        "hf://owner/name?split=train&revision=abc",
        "http://host:8000",
        "user@host",
        "a://b?x=1",
    ]
    base = load_config(ROOT / "configs" / "demo.py")
    for path in good:
        with pytest.raises(UserError) as caught:
            validate(apply_overrides(base, [f"data.path={path}"]))
        assert not any("password" in line for line in caught.value.problems)


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_tells_no_secret_and_leaves_nothing_for_others_to_write(tmp_path, monkeypatch):
    """Every byte that a run with a server leaves or prints, under umask 0."""
    key, token = "key-" + SECRET, "hf_" + SECRET
    folder, cache = tmp_path / "model", tmp_path / "cache"
    before = os.umask(0)
    try:
        made = {"steps": 1, "objective": "grpo", "teacher.sft.steps": 0, "eval.every": 0}
        train.main(command(tmp_path / "start", cache, **made))
        from kdrl_jax import convert

        convert.main(["--to=hf", str(tmp_path / "start"), str(folder)])
        with LocalServer(folder) as server:
            server.key = key
            settings = {
                **made,
                "student.path": folder,
                "student.sft.steps": 0,
                "rollout.server.url": server.url,
                "rollout.server.model": server.name,
            }
            run = [sys.executable, "-m", "kdrl_jax.train"]
            run += command(tmp_path / "run", cache, **settings)
            secrets = {"KDRL_SERVER_KEY": key, "HF_TOKEN": token}
            environment = {
                **os.environ,
                **secrets,
                "XLA_FLAGS": xla_flags(),
                "PYTHONPATH": str(ROOT),
            }
            done = subprocess.run(run, capture_output=True, cwd=ROOT, env=environment)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr[-2000:]
    told = {"stdout": done.stdout, "stderr": done.stderr}
    files = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    told |= {str(f): f.read_bytes() for f in files}
    assert {"config.json", "provenance.json", "summary.json"} <= {f.name for f in files}
    for name, content in told.items():
        assert SECRET.encode() not in content, name
    places = [tmp_path / "run", cache, *(tmp_path / "run").rglob("*"), *cache.rglob("*")]
    for place in places:
        assert not place.lstat().st_mode & 0o002 or place.is_symlink(), place


def test_keys_that_no_header_takes_are_not_quoted(tmp_path, monkeypatch, capsys):
    from kdrl_jax.training import serving

    monkeypatch.setenv("KDRL_SERVER_KEY", SECRET + "\n")
    changes = {"rollout.server.url": "http://127.0.0.1:9", "rollout.server.model": "m"}
    argv = command(tmp_path / "run", tmp_path / "cache", **(TINY | changes))
    assert serving.KEY_VARIABLE == "KDRL_SERVER_KEY"
    with pytest.raises(SystemExit):
        run_entry(lambda: train.main(argv))
    printed = "".join(capsys.readouterr())
    assert "KDRL_SERVER_KEY: holds a space, a line break" in printed
    assert SECRET not in printed


def test_a_server_that_quotes_the_key_is_not_quoted(tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from kdrl_jax.rollout.transport import Ask, Server

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"error": f"no access with {self.headers['Authorization']}"}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{http.server_port}"
        answer = Server(url, timeout_s=10, concurrency=1, key=SECRET).ask(Ask("GET", "/"))
        thread.join()
    assert answer.status == 401
    assert answer.words == "HTTP 401: no access with Bearer [the key]"


# --- folders that others can write in ------------------------------------------------------------


@pytest.mark.parametrize("which", ["workdir", "cache_dir"])
def test_folders_that_anybody_may_write_in_are_refused(tmp_path, capsys, which):
    run, cache = tmp_path / "run", tmp_path / "cache"
    for folder in (run, cache):
        folder.mkdir()
    open_one = run if which == "workdir" else cache
    open_one.chmod(0o1777)
    with pytest.raises(SystemExit) as end:
        run_entry(lambda: train.main(command(run, cache, objective="grpo")))
    assert end.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert which in line
    assert f"anybody may write in {open_one}" in line
    assert f"chmod o-w {open_one}" in line


def test_group_rights_are_left_to_the_user(tmp_path):
    before = os.umask(0o002)
    try:
        lock_folder(tmp_path / "run")
        write_atomic(tmp_path / "run" / "x.json", "{}")
        unlock_folder(tmp_path / "run")
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o775
        assert (tmp_path / "run" / "x.json").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)
