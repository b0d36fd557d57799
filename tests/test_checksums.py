"""SHA256SUMS of an exported folder: what coreutils says of it, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import model_cases as cases
import pytest
from safetensors.numpy import load_file, save_file

from kdrl_jax import processes
from kdrl_jax.models import checksums, load_hf, save_hf
from kdrl_jax.models.hf_files import open_hf
from kdrl_jax.training.roles import check_weights
from kdrl_jax.types import UserError

CONFIG = cases.CASES["qwen3_tied"]


@pytest.fixture
def folder(tmp_path):
    """An export in several files."""
    cases.write_folder(tmp_path / "in", CONFIG)
    model, params = load_hf(tmp_path / "in")
    save_hf(tmp_path / "out", model, params, max_shard_bytes=40_000)
    return tmp_path / "out"


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def refusal(folder) -> list[str]:
    """What opening the folder says; the start of a run must say the same."""
    with pytest.raises(UserError) as caught, open_hf(folder):
        pass
    assert check_weights(folder, None) == caught.value.problems
    return caught.value.problems


def test_coreutils_agrees_and_every_file_is_listed(folder):
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert names == sorted(f.name for f in folder.iterdir() if f.name != "SHA256SUMS")
    assert len(shards(folder)) > 2
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    listed = checksums.read_sums(folder)
    for file in folder.iterdir():
        if file.name != "SHA256SUMS":
            assert listed[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    load_hf(folder)


def test_truncated_flipped_and_swapped_files_are_named_all_at_once(folder):
    first, second, third, *_ = shards(folder)
    content = bytearray(first.read_bytes())
    content[-3] ^= 1  # a single bit of a weight: only a digest can tell
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-8])
    tensors = load_file(third)
    save_file({k: v + 1 for k, v in tensors.items()}, third, {"format": "pt"})
    lines = refusal(folder)
    assert [line.split(":")[0] for line in lines] == [str(first), str(second), str(third)]
    assert all("copy it again, or delete SHA256SUMS" in line for line in lines)


def test_a_changed_index_is_refused(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # other spacing
    assert [line.split(":")[0] for line in refusal(folder)] == [str(file)]


def test_a_file_that_is_not_listed_is_refused(folder):
    sums = folder / "SHA256SUMS"
    gone = shards(folder)[1].name
    sums.write_text("".join(x for x in sums.read_text().splitlines(True) if gone not in x))
    (line,) = refusal(folder)
    assert f"{gone}: not listed in SHA256SUMS" in line


def test_without_the_list_nothing_is_compared(folder):
    first = shards(folder)[0]
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    refusal(folder)
    (folder / "SHA256SUMS").unlink()
    load_hf(folder)


def test_configs_and_tokenizers_may_be_edited(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": "mine"}))
    load_hf(folder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{'0' * 64}  ../secret", "lies outside the folder"),
        (f"{'0' * 64}  /etc/passwd", "lies outside the folder"),
        (f"{'0' * 64} *a/../../b", "lies outside the folder"),
        (f"{'0' * 63}  model.safetensors", "is no line of sha256sum"),
        ("<html>not found</html>", "is no line of sha256sum"),
        (f"\\{'0' * 64}  a\\nb", "is no line of sha256sum"),
    ],
)
def test_lists_that_are_none(folder, line, said):
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + line + "\n")
    (problem,) = refusal(folder)
    assert problem.startswith(f"{sums}:")
    assert said in problem


def test_of_several_processes_each_reads_its_share(folder, monkeypatch):
    read: list[str] = []

    def spy(file):
        read.append(file.name)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setattr(checksums, "digest_of", spy)
    monkeypatch.setattr(processes, "count", lambda: 2)
    shares = []
    for index in (0, 1):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        read.clear()
        checksums.verify_files(folder, [f.name for f in shards(folder)])
        shares.append(sorted(read))
    assert sorted(shares[0] + shares[1]) == [f.name for f in shards(folder)]
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_a_file_is_read_once_but_again_when_it_has_changed(folder, monkeypatch):
    read: list[str] = []
    whole = hashlib.file_digest

    def spy(content, kind):
        read.append(Path(content.name).name)
        return whole(content, kind)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    checksums._read_digest.cache_clear()
    names = [f.name for f in shards(folder)]
    checksums.verify_files(folder, names)
    checksums.verify_files(folder, names)
    assert sorted(read) == names
    file = folder / names[0]
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match="is not the file that SHA256SUMS lists"):
        checksums.verify_files(folder, names)
