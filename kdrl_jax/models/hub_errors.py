"""What goes wrong between here and the hub, in one line with a remedy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

COMMIT = "[0-9a-f]{40}"
LONGEST_WAIT_S = 60.0
PASSING = (408, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed."""


class HubFailure(Exception):
    """A request that the hub did not answer as it should.

    Attributes:
      reason: what happened.
      remedy: what to do.
      passing: whether it may be otherwise in a while.
    """

    def __init__(self, reason: str, remedy: str, passing: bool = False):
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy, self.passing = reason, remedy, passing


def explain(
    call: Callable[[], T],
    api: Any,
    repo: str,
    revision: str,
    *,
    tries: int = 3,
    sleep: Callable[[float], Any] = time.sleep,
    say: Callable[[str], Any] = lambda line: None,
) -> T:
    """Returns what `call` returns, trying again after failures that pass.

    Args:
      call: asks the hub about `repo` at `revision`.
      api: of `huggingface_hub`; looks whether a missing model is a data set.
      tries: how often `call` is made at most.
      say: prints a line before a further try.

    Raises:
      HubFailure: why it failed. The message has no address, header or token.
    """
    for attempt in range(tries):
        try:
            with _quiet():
                return call()
        except Exception as error:
            failure = _failure(error, api, repo, revision)
            if failure is None:
                raise
            if not failure.passing or attempt == tries - 1:
                raise failure from None
            wait = min(_retry_after(error) or 2.0**attempt, LONGEST_WAIT_S)
            say(f"{repo}: {failure.reason}; trying again in {wait:g} s")
            sleep(wait)
    raise AssertionError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings off the screen: they print whole addresses."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _failure(error: Exception, api: Any, repo: str, revision: str) -> HubFailure | None:
    """Why a request failed; None if it is none of the hub's or the network's errors."""
    import httpx2
    from huggingface_hub import errors

    for cause in _causes(error):  # the library hides the first error behind others
        if isinstance(cause, errors.GatedRepoError):
            return HubFailure(
                "its owner grants access on request",
                f"ask for it on the page of {repo}, then set HF_TOKEN or run `hf auth login`",
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            return _not_found(api, repo)
        if isinstance(cause, errors.RevisionNotFoundError):
            return HubFailure(
                f"no revision {revision!r}", "give a branch, a tag or a commit that it has"
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return _by_status(cause)
    for cause in _causes(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return HubFailure(
                "HF_HUB_OFFLINE is set", "unset it, or download the model first", passing=True
            )
        if isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
            return HubFailure(
                f"the hub is out of reach ({type(cause).__name__})",
                "check the network and HF_ENDPOINT",
                passing=True,
            )
        if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
            return HubFailure(
                "a file arrived incomplete", "run again: what has arrived is kept", passing=True
            )
    if isinstance(error, OSError) and error.errno is not None:
        return HubFailure(f"{error.strerror} ({error.filename})", "free some space, or set HF_HOME")
    if isinstance(error, errors.HFValidationError):
        return HubFailure("not the name of a model", "write OWNER/NAME[@REVISION], or a folder")
    if isinstance(error, OSError | errors.EntryNotFoundError):
        return HubFailure(f"the hub answered otherwise ({type(error).__name__})", "run again")
    return None


def _by_status(error: Any) -> HubFailure:
    code = error.response.status_code if error.response is not None else 0
    if code == 401:
        return HubFailure(
            "the hub does not accept the token (401)", "renew HF_TOKEN or run `hf auth login`"
        )
    if code == 403:
        return HubFailure(
            "the hub refuses access (403)", "ask its owner, and set HF_TOKEN to a token that may"
        )
    if code == 429:
        return HubFailure(
            "the hub answers too many requests (429)",
            "wait some minutes, or set HF_TOKEN, which raises the limit",
            passing=True,
        )
    return HubFailure(
        f"the hub answers {code}", "try again later, or give a folder", passing=code in PASSING
    )


def _not_found(api: Any, repo: str) -> HubFailure:
    try:
        api.dataset_info(repo, timeout=10)
    except Exception:
        return HubFailure(
            "there is no folder of that name, and the hub has no such model, or it is private",
            "check the name; for a private one set HF_TOKEN or run `hf auth login`",
        )
    return HubFailure("is a data set and no model", f"as data write data.path=hf://{repo}")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those behind it, the first one last."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _retry_after(error: Exception) -> float:
    """Seconds that the hub asks to wait; 0 if it asks for none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        text = response.headers.get("Retry-After", "") if response is not None else ""
        if text.isdecimal():
            return float(text)
    return 0.0
