"""Many requests to one server at a time, with retries and a time limit; results as they arrive.

The requests run in an event loop of a thread of their own: whoever waits for the answers works on
those that have come, and everything in flight is cancelled when he stops waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import httpx2

from kdrl_jax.types import UserError

RETRIES = 5
"""After the first attempt, each after twice the wait of the one before."""
CONNECT_S = 10.0
"""To open a connection; a host that is not there would else take the whole time limit."""
AGAIN = "start the server again, then run the same command again to continue"


class Ask(NamedTuple):
    """One request: what is asked and how the reply is understood."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    read: Callable[[Reply], Any] = lambda reply: reply
    """Raises UserError for a reply that cannot be used, `Busy` for one to ask for again."""


class Reply(NamedTuple):
    """What the server said."""

    status: int
    content: Any
    """Of JSON; else the text."""

    @property
    def good(self) -> bool:
        """Whether the server did as it was asked."""
        return 200 <= self.status < 300

    @property
    def words(self) -> str:
        """The server's own explanation, as far as it fits a line."""
        found = self.content
        for key in ("error", "detail", "message"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        return f"HTTP {self.status}: {' '.join(str(found).split())[:300]}"


class Busy(Exception):
    """A reply that another attempt may better."""


class Server:
    """An HTTP server.

    Args:
      url: "http://host:port".
      timeout_s: of one request with its retries, not counting its wait for others.
      concurrency: requests in flight at a time.
      key: sent as a bearer token; "": none.
      wait_s: before the first retry.

    Attributes:
      losses: connections that failed so far; the server may have started anew since.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        concurrency: int,
        key: str = "",
        wait_s: float = 0.5,
    ):
        self.url, self.timeout_s, self.concurrency = url.rstrip("/"), timeout_s, concurrency
        self._headers, self._key = {"Authorization": f"Bearer {key}"} if key else {}, key
        self._wait_s, self.losses = wait_s, 0

    def ask(self, ask: Ask) -> Any:
        """One reply, read.

        Raises:
          UserError: see `ask_all`.
        """
        with self.ask_all([ask]) as answers:
            return next(answers)[0][1]

    @contextlib.contextmanager
    def ask_all(self, asks: Sequence[Ask]) -> Iterator[Iterator[list[tuple[int, Any]]]]:
        """Begin to ask, in the order given; leaving the context cancels what is not done.

        Gives an iterator over lists of (number in `asks`, what `read` made of the reply): all
        that have come since the last list, at least one.

        Raises:
          UserError: from the iterator: no reply after the retries or in time, or what `read`
            raises. Connections that fail, 429, 5xx and `Busy` are asked again.
        """
        flight = _Flight(self, asks)
        try:
            yield flight.answers()
        finally:
            flight.stop()

    def client(self) -> httpx2.AsyncClient:
        """Connections to the server, of the running event loop."""
        return httpx2.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency
            ),
            trust_env=False,  # a proxy for the world outside is none for the next node
        )

    async def insist(self, client: httpx2.AsyncClient, ask: Ask) -> Any:
        """A reply, read, after as many attempts as it takes and may take."""
        wait, trouble = self._wait_s, ""
        try:
            async with asyncio.timeout(self.timeout_s):
                for attempt in range(RETRIES + 1):
                    if attempt:
                        await asyncio.sleep(wait)
                        wait *= 2
                    try:
                        reply = await _once(client, ask, self._key)
                        if reply.status < 500 and reply.status != 429:
                            return ask.read(reply)
                        trouble = reply.words
                    except (httpx2.TransportError, httpx2.InvalidURL) as error:
                        self.losses += 1
                        trouble = f"{type(error).__name__}: {error}".rstrip(": ")
                    except Busy as error:
                        trouble = str(error)
        except TimeoutError:
            after = f", at last {trouble}" if trouble else ""
            raise UserError(
                f"rollout.server.url: {self.url} has not answered {ask.method} {ask.path} within "
                f"rollout.server.timeout_s={self.timeout_s:g}{after}; raise it, or {AGAIN}"
            ) from None
        raise UserError(
            f"rollout.server.url: {self.url} failed {ask.method} {ask.path} {RETRIES + 1} times, "
            f"at last {trouble}; {AGAIN}"
        )


async def _once(client: httpx2.AsyncClient, ask: Ask, key: str) -> Reply:
    response = await client.request(ask.method, ask.path, json=ask.body)
    text = response.text
    if key and response.status_code >= 400:  # some servers quote what they refuse; this is logged
        text = text.replace(key, "[the key]")
    try:
        return Reply(response.status_code, json.loads(text))
    except ValueError:
        return Reply(response.status_code, text)


class _Flight:
    """Requests on their way; the thread ends when all are answered, one fails, or at `stop`."""

    def __init__(self, server: Server, asks: Sequence[Ask]):
        self._server, self._asks = server, asks
        self._came: queue.SimpleQueue[tuple[int, Any] | BaseException] = queue.SimpleQueue()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollout server", daemon=True)
        self._thread.start()
        self._begun.wait()

    def answers(self) -> Iterator[list[tuple[int, Any]]]:
        left = len(self._asks)
        while left:
            came = [self._came.get()]
            while not self._came.empty():
                came.append(self._came.get())
            for item in came:
                if isinstance(item, BaseException):
                    raise item
            left -= len(came)
            yield came  # type: ignore[misc]

    def stop(self) -> None:
        # No loop any more: all is done; no loop yet: it could not be made.
        with contextlib.suppress(RuntimeError, AttributeError):
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            self._came.put(group.exceptions[0])
        except BaseException as error:  # whoever waits must hear of it
            self._came.put(error)
        finally:
            self._begun.set()

    async def _main(self) -> None:
        task = asyncio.current_task()
        assert task
        self._loop, self._task = asyncio.get_running_loop(), task
        self._begun.set()
        gate = asyncio.Semaphore(self._server.concurrency)  # first come, first served
        async with self._server.client() as client:

            async def one(number: int, ask: Ask) -> None:
                async with gate:
                    self._came.put((number, await self._server.insist(client, ask)))

            async with asyncio.TaskGroup() as group:
                for number, ask in enumerate(self._asks):
                    group.create_task(one(number, ask))
