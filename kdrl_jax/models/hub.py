"""Models of the Hugging Face hub, by name.

    OWNER/NAME              the newest commit of the branch `main`
    OWNER/NAME@REVISION     a branch, a tag or a commit of 40 digits

A folder of that name on disk is taken instead. `huggingface_hub` downloads into its own cache
(HF_HOME says where) config.json, generation_config.json, the tokenizer's files and the weights as
safetensors: no other weights and no code. Everything is checked before the weights are downloaded.
One process of a host downloads; the others wait for it. Weights are compared with the checksums of
the hub once, before they are used.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdrl_jax.models.checksums import escapes
from kdrl_jax.models.hf_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    load_config,
)
from kdrl_jax.models.hub_errors import COMMIT, HubFailure, explain
from kdrl_jax.models.hub_files import SMALL, HubModel, HubName, Snapshot
from kdrl_jax.types import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
TRIES = 3
"""How often a download begins: files that have arrived are kept, so a later try goes on."""
_SPARE = 1 << 28
"""Bytes of the disk that a download leaves free."""

Progress = Callable[[int, int], Any]
"""(bytes that have arrived, bytes of all files)."""


def parse_hub_name(text: str) -> HubName | None:
    """Returns the repository that `text` names; None if it has not the form of a name."""
    if not NAME.fullmatch(text) or ".." in text or "--" in text.partition("@")[0]:
        return None
    repo, _, revision = text.partition("@")
    return HubName(repo, revision or "main")


def hub_model_of(folder: Path) -> HubModel | None:
    """Returns the model that a folder of the cache holds; None for any other folder."""
    found = re.fullmatch(
        rf"models--([^/]+)--([^/]+)/snapshots/({COMMIT})", "/".join(folder.parts[-3:])
    )
    return HubModel(f"{found[1]}/{found[2]}", found[3], folder) if found else None


class Hub:
    """Finds and downloads models.

    Args:
      offline: True takes the cache alone.
      say: prints a line.
      loading: gives a context whose value is called with the progress of a download.
    """

    def __init__(
        self,
        *,
        offline: bool = False,
        say: Callable[[str], Any] = lambda line: None,
        loading: Callable[[str], Any] = lambda title: contextlib.nullcontext(lambda a, b: None),
    ):
        from huggingface_hub import constants

        self.offline = offline or constants.is_offline_mode()
        self.cache = Path(constants.HF_HUB_CACHE).expanduser()
        self._say, self._loading = say, loading

    def fetch(
        self, names: Mapping[str, HubName], *, weights: Iterable[str] | None = None
    ) -> dict[str, HubModel]:
        """Returns each model in a folder of the cache, after downloading what is missing.

        Args:
          names: by the config key or option that names the model.
          weights: the keys whose weights are needed; None: all. The others get the config and
            the tokenizer only.

        Raises:
          UserError: one line for each model that cannot be had, before any weights are downloaded;
            too little disk; a download that failed.
        """
        wanted = set(names if weights is None else weights)
        problems: list[str] = []
        parts: dict[str, Snapshot] = {}
        for key, name in names.items():
            try:
                with self._lock(name.repo):
                    parts[key] = self._small_files(key, name, key in wanted)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        missing = {part.folder: part for part in parts.values() if part.missing}
        if missing:
            self._weights(list(missing.values()))
        for key, part in parts.items():
            if key in wanted:
                part.check(key)
            part.remember(names[key])
        return {key: part.model for key, part in parts.items()}

    def config(self, key: str, name: HubName) -> HubModel:
        """Returns a model whose config and tokenizer are in the cache; see `fetch`."""
        return self.fetch({key: name}, weights=())[key]

    def _small_files(self, key: str, name: HubName, weights: bool) -> Snapshot:
        """Everything but the weights, and which of these are missing."""
        root = self.cache / f"models--{name.repo.replace('/', '--')}"
        commit = name.revision if name.pinned else ""
        cached = commit or _cached_commit(root, name.revision)
        if commit and (found := Snapshot.recorded(name.repo, root, commit, weights)):
            return found
        if self.offline:
            return self._from_cache(key, name, root, cached, weights, "offline")
        try:
            listed = self._listing(name)
            # A branch goes by the commit that was listed, so that all files are of one commit.
            commit, sizes = listed
            if found := Snapshot.recorded(name.repo, root, commit, weights):
                return found
            _require_model(key, name, sizes, weights)
            found = Snapshot(name.repo, root, commit, sizes)
            self._download(found, [file for file in SMALL if file in sizes])
        except HubFailure as failure:
            if failure.passing and cached and (root / "snapshots" / cached).is_dir():
                self._say(f"{key}: {name}: {failure.reason}; taken from the cache")
                return self._from_cache(key, name, root, cached, weights, failure.reason)
            raise UserError(f"{key}: {name}: {failure}") from failure
        _require_family(key, name, root / "snapshots" / commit)
        if weights:
            found.find_missing(key, name)
        else:
            found.record(weights=False)
        return found

    def _from_cache(
        self, key: str, name: HubName, root: Path, commit: str, weights: bool, why: str
    ) -> Snapshot:
        found = Snapshot(name.repo, root, commit, {})
        have = commit and (found.folder / CONFIG).is_file()
        if not have or (weights and found.absent()):
            what = f"lacks {found.absent()[0]} of it" if have else "does not hold it"
            first = "offline, and" if why == "offline" else f"{why}, and"
            raise UserError(
                f"{key}: {name}: {first} the cache {self.cache} {what}; run once with a network, "
                f"`hf download {name.repo}`, or give a folder"
            )
        _require_family(key, name, found.folder)
        return found

    def _listing(self, name: HubName) -> tuple[str, dict[str, int]]:
        """The commit of a repository's revision, and the sizes of its files in bytes."""
        from huggingface_hub import HfApi

        api = HfApi()

        def ask() -> Any:
            return api.model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=30
            )

        info = explain(ask, api, name.repo, name.revision, say=self._say)
        files = [f for f in info.siblings or [] if not escapes(f.rfilename)]
        return info.sha, {f.rfilename: f.size or 0 for f in files}

    def _snapshot(self, repo: str, commit: str, files: list[str]) -> None:
        from huggingface_hub import HfApi, snapshot_download

        def download() -> None:
            snapshot_download(
                repo,
                revision=commit,
                allow_patterns=[_literal(file) for file in files],
                cache_dir=self.cache,
                tqdm_class=_silent_bars(),
            )

        explain(download, HfApi(), repo, commit, tries=TRIES, say=self._say)

    def _weights(self, parts: list[Snapshot]) -> None:
        """Download the weights of all `parts`, with progress, and compare their checksums."""
        size = sum(part.missing_bytes for part in parts)
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        what = ", ".join(f"{part.model.repo} {_gb(part.missing_bytes)}" for part in parts)
        if size + _SPARE > free:
            raise UserError(
                f"{self.cache}: {_gb(free)} of disk are free, but {what} are to be downloaded; "
                "free some space, or set HF_HOME to a folder of a larger disk"
            )
        self._say(f"downloading {what} to {self.cache}, where {_gb(free)} are free")
        with self._loading("download") as progress:
            done = 0
            for part in parts:
                with self._lock(part.model.repo), _watched(part, done, size, progress):
                    part.sweep()
                    try:
                        self._download(part, part.missing)
                    except HubFailure as failure:
                        raise UserError(f"{part.model}: {failure}") from failure
                    part.record(weights=True)
                done += part.missing_bytes

    def _download(self, part: Snapshot, files: list[str]) -> None:
        """Download files; what arrives damaged is downloaded once more.

        Raises:
          HubFailure: they cannot be had, or arrive damaged again. Nothing damaged is kept.
        """
        self._snapshot(part.model.repo, part.model.commit, files)
        if not (damaged := part.damaged(files)):
            return
        part.discard(damaged)
        self._say(f"{part.model}: {', '.join(damaged)}: damaged on the way; downloading again")
        self._snapshot(part.model.repo, part.model.commit, damaged)
        if damaged := part.damaged(damaged):
            part.discard(damaged)
            raise HubFailure(
                f"{', '.join(damaged)}: the checksum is not the hub's, twice",
                "nothing of it was kept; check the network and its proxies, then run again",
            )

    @contextlib.contextmanager
    def _lock(self, repo: str) -> Iterator[None]:
        """Held by the one process of a host that downloads a model."""
        from filelock import FileLock, Timeout

        folder = self.cache / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"kdrl_jax--{repo.replace('/', '--')}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
            if not lock.is_locked:
                self._say(f"{repo}: waiting for another process, which downloads it")
                lock.acquire()
        except OSError:  # a cache that is read-only needs no lock
            yield
            return
        try:
            yield
        finally:
            lock.release()


def _require_model(key: str, name: HubName, sizes: dict[str, int], weights: bool) -> None:
    """Refuse a repository without a config or, where they are needed, safetensors."""
    if CONFIG not in sizes:
        if "adapter_config.json" in sizes:
            raise UserError(
                f"{key}: {name}: holds adapters (PEFT) and no model; merge them into their base "
                "with PEFT, or name the base"
            )
        if any(file.endswith(".gguf") for file in sizes):
            raise UserError(
                f"{key}: {name}: holds GGUF files alone; name the repository with safetensors"
            )
        raise UserError(f"{key}: {name}: holds no {CONFIG}; name a model's repository")
    if weights and not {WEIGHTS, INDEX} & sizes.keys():
        other = sorted(f for f in sizes if f.endswith((".bin", ".pt", ".pth", ".gguf", ".h5")))
        raise UserError(
            f"{key}: {name}: holds no {WEIGHTS}"
            + (f", only {', '.join(other[:3])}" if other else "")
            + "; other weights are not read: take a revision with safetensors, or save it as such "
            "(save_pretrained) and give the folder"
        )


def _require_family(key: str, name: HubName, folder: Path) -> None:
    try:
        load_config(folder)
    except UserError as error:
        lines = [line.replace(str(folder / CONFIG), str(name), 1) for line in error.problems]
        raise UserError(*(f"{key}: {line}" for line in lines)) from error


def _cached_commit(root: Path, revision: str) -> str:
    """The commit that a branch or tag had when it was last asked for; "" if it never was."""
    if escapes(revision):
        return ""
    with contextlib.suppress(OSError):
        text = (root / "refs" / revision).read_text(encoding="ascii").strip()
        return text if re.fullmatch(COMMIT, text) else ""
    return ""


@contextlib.contextmanager
def _watched(part: Snapshot, before: int, total: int, progress: Progress) -> Iterator[None]:
    """Report how much of a download has arrived, by the size of the files in the cache."""
    over = threading.Event()
    blobs = part.folder.parent.parent / "blobs"

    def size() -> int:
        found = 0
        with contextlib.suppress(OSError):
            for file in blobs.iterdir():
                with contextlib.suppress(OSError):
                    found += file.stat().st_size
        return found

    there = size()
    expected = part.missing_bytes

    def watch() -> None:
        while not over.wait(0.5):
            progress(before + min(max(size() - there, 0), expected), total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    progress(before + expected, total)


def _silent_bars() -> Any:
    """A class of progress bars that draw nothing: the display shows the progress."""
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
