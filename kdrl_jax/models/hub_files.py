"""The files of a hub's model in the cache: those that are there, and whether they are right."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub.utils.sha import git_hash

from kdrl_jax.models.checksums import SUMS, THREADS, digest_of, escapes
from kdrl_jax.models.hf_files import CONFIG, GENERATION, INDEX, TOKENIZER_FILES, WEIGHTS, read_json
from kdrl_jax.models.hub_errors import COMMIT
from kdrl_jax.types import UserError

ABANDONED_S = 3600.0
"""A file of an unfinished download that nobody wrote to for so long is nobody's."""
SMALL = (CONFIG, GENERATION, INDEX, SUMS, *TOKENIZER_FILES)
"""Files that are downloaded before the weights, where a repository has them."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository of the hub, and a branch, tag or commit of it."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(re.fullmatch(COMMIT, self.revision))


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit, in a folder of the cache."""

    repo: str
    commit: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"


class Snapshot:
    """A model's files at one commit: those in the cache and those that are missing.

    The record is a file beside the snapshots: it is written when all files are there and their
    checksums are right, so a later start needs no network.
    """

    def __init__(self, repo: str, root: Path, commit: str, sizes: dict[str, int]):
        self.folder = root / "snapshots" / commit
        self.model = HubModel(repo, commit, self.folder)
        self._record = root / "kdrl_jax" / f"{commit}.json"
        self._sizes = sizes
        self.missing: list[str] = []
        self._checked = False

    @classmethod
    def recorded(cls, repo: str, root: Path, commit: str, weights: bool) -> Snapshot | None:
        """Returns a model whose record says that it is complete, if its files are still there."""
        found = cls(repo, root, commit, {})
        try:
            record = json.loads(found._record.read_text(encoding="utf-8"))
            sizes = {file: (found.folder / file).stat().st_size for file in record["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if sizes != record["files"] or (weights and not record["weights"]):
            return None
        found._checked = True
        return found

    def record(self, weights: bool) -> None:
        """Write down that what is there is complete."""
        self._checked = weights
        files = [file for file in (*SMALL, *self.weights()) if self._has(file)]
        sizes = {file: (self.folder / file).stat().st_size for file in files}
        with contextlib.suppress(OSError):  # a shared cache may be read-only
            if not weights and self._record.exists():
                return
            self._record.parent.mkdir(exist_ok=True)
            partial = self._record.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"weights": weights, "files": sizes}), encoding="utf-8")
            partial.replace(self._record)

    def remember(self, name: HubName) -> None:
        """Write down which commit a branch or tag has, as `huggingface_hub` does, for later starts
        without a network.
        """
        file = self.folder.parent.parent / "refs" / name.revision
        if name.pinned or escapes(name.revision):
            return
        with contextlib.suppress(OSError):
            if not file.is_file() or file.read_text(encoding="ascii") != self.model.commit:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(self.model.commit, encoding="ascii")

    def weights(self) -> list[str]:
        """The files of weights that the index lists, or the single one."""
        if (self.folder / INDEX).is_file():
            listed = read_json(self.folder / INDEX).get("weight_map")
            values = listed.values() if isinstance(listed, dict) else ()
            return sorted({x for x in values if isinstance(x, str) and not escapes(x)})
        return [WEIGHTS]

    def absent(self) -> list[str]:
        """The files of weights that are not in the cache."""
        return [file for file in self.weights() if not self._has(file)]

    def find_missing(self, key: str, name: HubName) -> None:
        """Find the weights that must be downloaded; refuse those that the hub has not."""
        if lost := [file for file in self.weights() if file not in self._sizes]:
            raise UserError(
                f"{key}: {name}: {INDEX} lists {lost[0]}, which the repository lacks; take another "
                "revision"
            )
        self.missing = self.absent()
        if not self.missing:
            self.check(key)

    def _has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    @property
    def missing_bytes(self) -> int:
        """The size of what must be downloaded."""
        return sum(self._sizes[file] for file in self.missing)

    def damaged(self, files: Iterable[str] | None = None) -> list[str]:
        """The files in the cache that are not what the hub lists.

        Args:
          files: which are compared; None: the weights.
        """
        names = [f for f in (self.weights() if files is None else files) if self._has(f)]

        def wrong(file: str) -> bool:
            path = self.folder / file
            blob = path.resolve().name  # the cache names a file by its checksum
            if re.fullmatch("[0-9a-f]{64}", blob):
                return digest_of(path) != blob
            if re.fullmatch(COMMIT, blob):  # a small one: by that of Git
                return git_hash(path.read_bytes()) != blob
            return False

        with ThreadPoolExecutor(max_workers=min(THREADS, os.cpu_count() or 1)) as pool:
            return [file for file, bad in zip(names, pool.map(wrong, names), strict=True) if bad]

    def sweep(self) -> None:
        """Delete what downloads left that were killed, unless another may still be writing it."""
        for file in (self.folder.parent.parent / "blobs").glob("*.incomplete"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > ABANDONED_S:
                    file.unlink()

    def discard(self, files: Iterable[str]) -> None:
        """Delete files from the cache."""
        for file in files:
            path = self.folder / file
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def check(self, key: str) -> None:
        """Compare weights that were in the cache with their checksums, once.

        Raises:
          UserError: they are damaged.
        """
        if self._checked:
            return
        if damaged := self.damaged():
            raise UserError(
                f"{key}: {self.folder / damaged[0]}: the checksum is not the hub's; delete "
                f"{self.folder.parent.parent} and run again"
            )
        self.record(weights=True)
