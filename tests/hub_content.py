"""What a local hub holds and says: files, repositories, answers, and small models to put there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import model_cases
import numpy as np
import tokenizer_cases
from safetensors.numpy import save_file

DATE = "2025-01-01T00:00:00.000Z"
LFS = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", ".arrow", ".gz", ".zip", ".model")
CHUNK = 1 << 16


@dataclass
class File:
    """One file. A path is read when it is asked for; its sums are taken when first needed."""

    name: str
    source: bytes | Path

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def lfs(self) -> bool:
        """Whether a hub keeps it outside git: then its tag is its SHA-256."""
        return self.name.endswith(LFS) or self.size > 10_000_000

    @cached_property
    def sha256(self) -> str:
        return self._sum(hashlib.sha256())

    @cached_property
    def oid(self) -> str:
        """The id that git gives these bytes (or, in LFS, the pointer that stands for them)."""
        if self.lfs:
            spec = "https://git-lfs.github.com/spec/v1"
            pointer = f"version {spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
            return hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()
        return self._sum(hashlib.sha1(f"blob {self.size}\0".encode()))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def _sum(self, digest: Any) -> str:
        for chunk in self.chunks(0, self.size):
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self, start: int, stop: int, size: int = CHUNK) -> Iterator[bytes]:
        """The bytes [start, stop), at most `size` at a time."""
        if isinstance(self.source, bytes):
            for i in range(start, stop, size):
                yield self.source[i : min(i + size, stop)]
            return
        with self.source.open("rb") as f:
            f.seek(start)
            for i in range(start, stop, size):
                yield f.read(min(size, stop - i))


@dataclass
class Answer:
    """What goes back: a status, headers, and bytes or a file."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | File = b""


def answer_json(content: Any, **headers: str) -> Answer:
    return Answer(200, {"Content-Type": "application/json"} | headers, json.dumps(content).encode())


def answer_error(status: int, message: str, code: str = "", **headers: str) -> Answer:
    """An error in the hub's own words: its code tells the client which exception to raise."""
    said = {"X-Error-Message": message, "X-Request-Id": "Root=1-0"}
    said |= {"X-Error-Code": code} if code else {}
    content = json.dumps({"error": message}).encode()
    return Answer(status, {"Content-Type": "application/json"} | said | headers, content)


@dataclass
class Repo:
    """One model or dataset: `refs` name -> commit, `commits` commit -> path -> file."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    token: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit stands for."""
        revision = revision.removeprefix("refs/heads/")
        known = {c: c for c in self.commits} | self.tags | self.refs
        return known.get(revision)

    def admits(self, token: str | None) -> bool:
        """Whether a token opens it, should it be closed."""
        return token is not None and token == self.token

    def about(self, commit: str, verb: str, path: str, query: dict[str, list[str]]) -> Answer:
        """What the API says: `tree`, `paths-info`, `refs`, `commits`, or else the whole."""
        flags = {name for name, values in query.items() if values[-1].lower() in ("true", "1")}
        if verb == "tree":
            entries = self.tree(commit, path, "recursive" in flags, "expand" in flags)
            if path and not entries:
                return answer_error(404, f"{path} does not exist", "EntryNotFound")
            return answer_json(entries)
        if verb == "paths-info":
            every = {e["path"]: e for e in self.tree(commit, "", True, "expand" in flags)}
            return answer_json([every[p] for p in query.get("paths", []) if p in every])
        if verb == "refs":
            branches, tags = (
                [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": c} for n, c in x.items()]
                for where, x in (("heads", self.refs), ("tags", self.tags))
            )
            return answer_json({"branches": branches, "tags": tags, "converts": []})
        if verb == "commits":
            about = {"id": commit, "title": "Add files", "message": "", "authors": [], "date": DATE}
            return answer_json([about])
        info = self.info(commit, "blobs" in flags)
        kept = {"_id", "id", *query.get("expand", info)}
        return answer_json({name: value for name, value in info.items() if name in kept})

    def file(self, commit: str, path: str) -> Answer:
        """A file with the headers that name its content, or that there is none."""
        headers = {"X-Repo-Commit": commit}
        file = self.commits[commit].get(path)
        if file is None:
            return answer_error(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        return Answer(200, headers | {"Content-Type": "application/octet-stream"}, file)

    def closed(self, token: str | None) -> Answer:
        """What a gated repository tells those whom it does not let in."""
        said = f"Access to {self.kind} {self.id} is restricted"
        if token:
            said += " and you are not in the authorized list. Visit its page to ask for access."
            return answer_error(403, said, "GatedRepo")
        said += ". You must have access to it and be authenticated to access it. Please log in."
        return answer_error(401, said, "GatedRepo")

    def info(self, commit: str, blobs: bool) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for path, file in self.commits[commit].items():
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1] |= {"size": file.size, "blobId": file.oid}
                if file.lfs:
                    about = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
                    siblings[-1]["lfs"] = about
        return {
            "_id": hashlib.md5(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.split("/")[0],
            "sha": commit,
            "createdAt": DATE,
            "lastModified": DATE,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": 1,
            "likes": 0,
            "tags": [],
            "cardData": {},
            "usedStorage": sum(f.size for f in self.commits[commit].values()),
            "siblings": siblings,
        }

    def tree(self, commit: str, under: str, deep: bool, expand: bool) -> list[dict[str, Any]]:
        """Entries below a folder (or the file itself), folders among them; [] if there is none."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in self.commits[commit].items():
            inside = PurePosixPath(path).relative_to(under).parts if _below(path, under) else ()
            for depth in range(1, len(inside) if deep else min(2, len(inside))):
                folder = str(PurePosixPath(under, *inside[:depth]))
                oid = hashlib.sha1(folder.encode()).hexdigest()
                found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            if len(inside) == 1 or (inside and deep):
                found[path] = _entry(path, file)
        last = {"id": commit, "title": "Add files", "date": DATE}
        safe = {"status": "safe", "avScan": None, "pickleImportScan": None}
        for entry in found.values() if expand else ():
            entry |= {"lastCommit": last, "securityFileStatus": safe}
        return [found[path] for path in sorted(found)]


def _below(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")


def _entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


KINDS = {"qwen2": "qwen2", "qwen3": "qwen3_tied", "llama": "llama_tied"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tiny_model(
    folder: Path,
    *,
    kind: str = "qwen2",
    tokenizer: Path | None = None,
    vocabulary: int | None = None,
    sharded: bool = False,
    max_positions: int = 40960,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Writes a small model as its authors would publish it. Returns the folder.

    Args:
      kind: "qwen2", "qwen3" or "llama".
      tokenizer: a folder whose tokenizer to take; by default all share the one of
        `tokenizer_cases`, which has a chat template and ends turns with <|im_end|>.
      vocabulary: rows of the embedding, at least the tokenizer's tokens; by default those.
      sharded: two safetensors files with an index instead of one file.
      changes: to config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer_cases.write_hf(folder, settings=ends, eos=[2, 0])
    else:
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, folder / name)
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = {*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = model_cases.CASES[KINDS[kind]] | sizes
    config |= {"vocab_size": vocabulary or max(tokens) + 1, "eos_token_id": 2, "bos_token_id": 0}
    config |= {"max_position_embeddings": max_positions, "torch_dtype": "float32"} | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = model_cases.random_tensors(config, seed)
    parts: dict[str, dict[str, np.ndarray]] = {"model.safetensors": tensors}
    if sharded:
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        parts = {
            name: {k: tensors[k] for k in sorted(tensors)[i::2]} for i, name in enumerate(names)
        }
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
            "weight_map": {k: name for name, part in parts.items() for k in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    return folder
