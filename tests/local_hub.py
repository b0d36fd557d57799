"""A model hub on 127.0.0.1 that the installed `huggingface_hub` and `datasets` take for real.

It answers what those clients ask when they read: what a repository holds at a revision, its tree,
its paths, and its files with tags, ranges and redirects. It also fails on demand, as hubs do.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

import pytest
from hub_content import CHUNK, Answer, File, Repo, answer_error, answer_json, tiny_model

__all__ = ["LocalHub", "tiny_model"]

Content = Mapping[str, bytes | str | Path]
"""Path in a repository -> the bytes, the text, or the file on disk that has them."""

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+(?:/[^/]+)??)"
    r"(?:/(?P<verb>revision|tree|paths-info|refs|commits|auth-check)"
    r"(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<id>[^/]+(?:/[^/]+)??)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


@dataclass
class _Fault:
    kind: str
    pattern: str
    times: int | None
    method: str | None
    what: dict[str, Any]


class LocalHub:
    """Serves repositories. Use as a context manager; all may be changed while it runs.

    Attributes:
      url: where it is.
      elsewhere: the same server under another host's name, for redirects.
      requests: (method, path with query, headers) of all that was asked, in order.
      tokens: further valid tokens, of accounts that have access to no closed repository.
      page_size: entries of one page of a tree.
    """

    def __init__(self, page_size: int = 1000):
        self.page_size = page_size
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.tokens: set[str] = set()
        self.repos: dict[tuple[str, str], Repo] = {}
        self._faults: list[_Fault] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._sockets: set[socket.socket] = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub

        class Listener(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *args: Any) -> None:
                if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone
                    super().handle_error(*args)

        self._http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.elsewhere = f"http://localhost:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Be gone, with every connection: afterwards it is a host that refuses."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # What it holds.

    def add_model(self, id: str, folder: Path | None = None, **options: Any) -> str:
        """Add the files of `folder` and those of `extra`, a `Content`; see `add` for the rest."""
        files: dict[str, Any] = dict(options.pop("extra", {}))
        if folder:
            paths = (p for p in folder.rglob("*") if p.is_file())
            files = {p.relative_to(folder).as_posix(): p for p in paths} | files
        return self.add("model", id, files, **options)

    def add_dataset(self, id: str, files: Content, **options: Any) -> str:
        """Add the files of a dataset; see `add`."""
        return self.add("dataset", id, files, **options)

    def add(
        self,
        kind: str,
        id: str,
        files: Content,
        *,
        revision: str = "main",
        commit: str | None = None,
        tags: tuple[str, ...] = (),
        private: bool = False,
        gated: bool = False,
        token: str | None = None,
    ) -> str:
        """Add one commit of a repository, which is made when it is not there yet.

        Args:
          revision: the branch that points to the commit from now on.
          commit: its 40 hex digits; by default they follow from the content.
          tags: that point to it.
          private, gated: who has not `token` gets no answer, or a list without the files.
        """
        content = {
            path: File(path, x.encode() if isinstance(x, str) else x)
            for path, x in sorted(files.items())
        }
        if commit is None:
            sums = "".join(f"{path}\0{file.etag}\0" for path, file in content.items())
            commit = hashlib.sha1(f"{kind} {id}\0{sums}".encode()).hexdigest()
        with self._lock:
            repo = self.repos.setdefault((kind, id), Repo(kind, id))
            repo.private, repo.gated, repo.token = private, gated, token
            repo.commits[commit] = content
            repo.refs[revision] = commit
            repo.tags |= dict.fromkeys(tags, commit)
        return commit

    # How it fails. Patterns are those of `fnmatch`, for the path without its query; the first
    # fault that fits is taken, `times` times (None: always).

    def fail(
        self,
        pattern: str,
        status: int = 503,
        times: int | None = 1,
        headers: Mapping[str, str] | None = None,
        message: str = "",
        method: str | None = None,
    ) -> None:
        """Answer with a status that stands for no repository: overload, an outage, a firewall."""
        what = {"status": status, "headers": dict(headers or {}), "message": message}
        self._faults.append(_Fault("fail", pattern, times, method, what))

    def cut(self, pattern: str, after_bytes: int, times: int | None = 1) -> None:
        """Announce a whole body and hang up after so many bytes of it."""
        self._faults.append(_Fault("cut", pattern, times, "GET", {"after": after_bytes}))

    def corrupt(self, pattern: str, times: int | None = None) -> None:
        """Send a body of the right size whose last byte is another than the tag's sum is of."""
        self._faults.append(_Fault("corrupt", pattern, times, "GET", {}))

    def slow(
        self,
        pattern: str,
        delay_s: float = 0.0,
        bytes_per_second: float | None = None,
        times: int | None = None,
    ) -> None:
        """Wait before an answer, or let its body trickle."""
        what = {"delay_s": delay_s, "rate": bytes_per_second}
        self._faults.append(_Fault("slow", pattern, times, None, what))

    def redirect(self, pattern: str, to: str | None = None, times: int | None = None) -> None:
        """Send clients to another host for files; the path is the same there unless `to` has one.

        By default that host is this server by another name, which asks for no token: the `Host`
        and `Authorization` of what arrives there are in `requests`.
        """
        what = {"to": (to or self.elsewhere).rstrip("/")}
        self._faults.append(_Fault("redirect", pattern, times, None, what))

    def heal(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    # What tests ask it.

    def asked(self, pattern: str, method: str | None = None) -> list[dict[str, str]]:
        """Headers (names in lower case) of the requests whose path without query fits."""
        return [
            headers
            for m, path, headers in self.requests
            if fnmatch.fnmatchcase(_plain(path), pattern) and method in (None, m)
        ]

    def environment(self, cache: Path, **changes: str) -> dict[str, str]:
        """A whole environment for a child process for which this is the hub.

        It is this process's own without what would point elsewhere: settings of other hubs,
        caches, tokens, proxies, and being offline.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
            and name != "KDRL_OFFLINE"
            and not name.lower().endswith("_proxy")
        }
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        return kept | ours | changes

    def here(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make this the hub of this process, too, whose libraries read their settings on import."""
        changed = self.environment(cache)
        for name in set(os.environ) - set(changed):
            patch.delenv(name)
        for name, value in changed.items():
            patch.setenv(name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings: dict[str, dict[str, Any]] = {
            "huggingface_hub.constants": {
                "ENDPOINT": self.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": template,
                "HF_HUB_CACHE": str(cache / "hub"),
                "HF_TOKEN_PATH": str(cache / "token"),
                "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True,
                "HF_HUB_DISABLE_TELEMETRY": True,
            },
            "huggingface_hub.hf_api": {"api.endpoint": self.url},
            "datasets.config": {
                "HF_ENDPOINT": self.url,
                "HF_DATASETS_CACHE": cache / "datasets",
                "HF_HUB_OFFLINE": False,
                "HF_DATASETS_OFFLINE": False,
            },
        }
        for module, values in settings.items():
            importlib.import_module(module)
            for name, value in values.items():
                patch.setattr(f"{module}.{name}", value)

    # How it answers.

    def _take(self, kind: str, method: str, path: str) -> dict[str, Any] | None:
        """The fault of a kind that this request meets, if any, counted."""
        with self._lock:
            for fault in self._faults:
                fits = fnmatch.fnmatchcase(_plain(path), fault.pattern)
                if fault.kind == kind and fits and fault.method in (None, method):
                    if fault.times == 0:
                        continue
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault.what
        return None

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """What goes back for a request, whole."""
        away = headers.get("host") == urlsplit(self.elsewhere).netloc
        token = None if away else headers.get("authorization", "").removeprefix("Bearer ") or None
        if what := self._take("fail", method, path):
            status, message = what["status"], what["message"] or f"Error {what['status']}"
            return answer_error(status, message, **what["headers"])
        if token and token not in self.tokens | {r.token for r in self.repos.values()}:
            return answer_error(401, "Invalid credentials in Authorization header")
        where = urlsplit(path).path
        if not (match := _API.fullmatch(where) or _FILE.fullmatch(where)):
            return answer_error(404, "Sorry, we can't find the page you are looking for.")
        asked = {name: unquote(value or "") for name, value in match.groupdict().items()}
        kind = "dataset" if asked["kind"].startswith("datasets") else "model"
        repo = self.repos.get((kind, asked["id"]))
        admitted = repo is not None and (away or repo.admits(token))
        if repo is None or (repo.private and not admitted):
            # The client reads a 401 without a code as a missing repository over https alone.
            if token:
                return answer_error(404, "Repository not found", "RepoNotFound")
            return answer_error(401, "Invalid username or password.", "RepoNotFound")
        commit = repo.resolve(asked["revision"] or "main")
        if commit is None:
            return answer_error(404, f"Invalid rev id: {asked['revision']}", "RevisionNotFound")
        if "verb" in asked:
            query = parse_qs(urlsplit(path).query) | parse_qs(body.decode())
            answer = repo.about(commit, asked["verb"], asked["path"].strip("/"), query)
            return self._page(answer, path) if asked["verb"] == "tree" else answer
        if repo.gated and not admitted:
            return repo.closed(token)
        answer = repo.file(commit, asked["path"])
        if not away and answer.status == 200 and (what := self._take("redirect", method, path)):
            to = what["to"] if urlsplit(what["to"]).path else what["to"] + path
            return Answer(302, answer.headers | {"Location": to})
        return answer

    def _page(self, answer: Answer, path: str) -> Answer:
        """One page of a list, with a link to the next."""
        query = dict(parse_qsl(urlsplit(path).query))
        start = int(query.get("cursor", 0))
        stop = start + self.page_size
        entries = json.loads(answer.body) if isinstance(answer.body, bytes) else []
        if answer.status != 200 or len(entries) <= self.page_size:
            return answer
        page = answer_json(entries[start:stop])
        if stop < len(entries):
            to = f"{self.url}{urlsplit(path).path}?{urlencode(query | {'cursor': stop})}"
            page.headers["Link"] = f'<{to}>; rel="next"'
        return page


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer, and sends that as whole or as broken as asked."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def setup(self) -> None:
        super().setup()
        self.hub._sockets.add(self.connection)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub, method, path = self.hub, self.command, self.path
        hub.requests.append((method, path, headers))
        slow = hub._take("slow", method, path) or {"delay_s": 0.0, "rate": None}
        hub._closing.wait(slow["delay_s"])
        answer = hub.answer(method, path, headers, body)
        file = answer.body if isinstance(answer.body, File) else File("", answer.body)
        start, stop = 0, file.size
        if isinstance(answer.body, File) and (wanted := headers.get("range")):
            start, stop = _range(wanted, file.size)
            answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
            answer.status = 206
            if start >= stop:
                answer.status, start, stop = 416, 0, 0
                answer.headers["Content-Range"] = f"bytes */{file.size}"
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if method == "HEAD" or start == stop:
            return
        cut = hub._take("cut", method, path) or {"after": stop - start}
        end = min(stop, start + cut["after"])
        corrupt = hub._take("corrupt", method, path) is not None
        step = CHUNK if slow["rate"] is None else max(1, int(slow["rate"] / 20))
        for chunk in file.chunks(start, end, step):
            start += len(chunk)
            if corrupt and start == file.size:
                chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
            self.wfile.write(chunk)
            if slow["rate"] is not None and hub._closing.wait(len(chunk) / slow["rate"]):
                break
        if start < stop:
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def _plain(path: str) -> str:
    return unquote(urlsplit(path).path)


def _range(text: str, size: int) -> tuple[int, int]:
    """'bytes=A-B', 'bytes=A-' or 'bytes=-N' as [start, stop)."""
    first, last = text.removeprefix("bytes=").split("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
