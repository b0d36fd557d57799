"""Grading in worker processes that can be killed.

math-verify runs SymPy on what a model wrote, which can hang, exhaust memory or crash; a task's own
verifier is the user's code, which may do the same. Each worker is a fresh interpreter (never a fork
of this one, which holds JAX's threads) running `worker.py`; `supervisor` starts, times and replaces
them. What is done in this process is linear in the response's length.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kdrl_jax.rewards.format import FORMS, answer_part, as_response, final_answer
from kdrl_jax.rewards.math_answer import (
    MAX_LENGTH,
    clean,
    quick_verdict,
    same_unit,
    too_deep,
    without_unit,
)
from kdrl_jax.rewards.supervisor import Counts, Request, Supervisor, kill_all, worker_command
from kdrl_jax.rewards.text_answer import has_words, same_text
from kdrl_jax.types import Outcome, UserError, Verdict

REMEMBERED = 10_000  # verdicts of earlier comparisons
MAX_BOX = 10 * MAX_LENGTH  # characters of a box that are still looked at
MAX_WAITING = 256  # calls of `submit` that may wait; one more waits for the first to be done

Verifier = Callable[[str, str, dict[str, Any]], bool]
"""(the response's answer, gold answer, the problem's meta) -> whether the answer is right."""

Extractor = Callable[[str], str | None]
"""(completion) -> its answer, or None where it has none."""

Found = tuple[str | None, Outcome | None]
"""The answer of a response; or None and, where the search for it failed, the outcome."""


class Grader:
    """Grades responses; a context manager that owns up to `workers` processes.

    Processes start when the first answer needs one: equal strings, words and plain numbers are
    decided here. They are ended by `close`, at the end of the `with` block, or with the program.
    """

    def __init__(
        self,
        workers: int = 4,
        timeout_s: float = 3.0,
        require_format: bool = True,
        verify: Verifier | str | None = None,
        form: Extractor | str = "boxed",
    ):
        """
        Args:
          workers: most processes at a time, 1 or more.
          timeout_s: wall-clock seconds for one comparison from hand-over to reply, a hard limit. A
            worker's start is not counted. What is slow to compare may thus time out on a busy
            machine alone, the one outcome that can vary; it is asked again the next time.
          require_format: a response that lacks the format (`has_format`) is not graded further.
          verify: judges the answer. None: mathematical equivalence; of the form "text" an answer
            with words in it is compared as a text alone. A function: called in this process, so it
            must be quick whatever it is given. 'module:attribute': imported and called in the
            worker processes, with their time limit; they find the module on this process's
            `sys.path`.
          form: of the answer in a response: one of FORMS, see `format.final_answer`; or, in this
            process or by its name like `verify`, a function that finds it. That is given the whole
            completion or, where the format is required, what follows `</think>`.

        Raises:
          ValueError: a number out of range, or no such form.
        """
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"need workers >= 1 and timeout_s > 0, not {workers} and {timeout_s}")
        if isinstance(form, str) and form not in FORMS and ":" not in form:
            raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}, nor module:attribute")
        self.workers, self.timeout_s, self.require_format = workers, timeout_s, require_format
        self.verify, self.form = verify, form
        own = ("verify", [verify]) if isinstance(verify, str) else None
        self._command = worker_command(timeout_s, own)
        needed = verify if isinstance(verify, str) else "math-verify"
        self._supervisor = Supervisor(
            self._command, workers, timeout_s, needed, secrets=isinstance(verify, str)
        )
        self._pool = self._supervisor.workers
        self._readers: Supervisor | None = None
        if isinstance(form, str) and form not in FORMS:
            command = worker_command(timeout_s, ("answer", [form]))
            self._readers = _Readers(command, workers, timeout_s, form)
            self._end_readers = weakref.finalize(self, kill_all, self._readers.workers)
        self._known: collections.OrderedDict[Request, Outcome] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._background: ThreadPoolExecutor | None = None
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._finalizer = weakref.finalize(self, kill_all, self._pool)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and with CancelledError what is being graded and what waits.

        Grading again would start new workers.
        """
        supervisors = [s for s in (self._supervisor, self._readers) if s]
        for supervisor in supervisors:
            supervisor.stop()
        if self._background:
            self._background.shutdown(cancel_futures=True)
            self._background = None
        with self._lock:
            for supervisor in supervisors:
                kill_all(supervisor.workers)
                supervisor.resume()

    def take_counts(self) -> Counts:
        """What the worker processes have done since the last call."""
        with self._lock:
            counts, self._supervisor.counts = self._supervisor.counts, Counts()
            if self._readers:
                first, second = dataclasses.asdict(counts), dataclasses.asdict(self._readers.counts)
                longest = max(counts.seconds_max, self._readers.counts.seconds_max)
                both = {name: first[name] + second[name] for name in first}
                counts, self._readers.counts = Counts(**both | {"seconds_max": longest}), Counts()
        return counts

    def grade(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        metas: Sequence[dict[str, Any]] | None = None,
        *,
        require_format: bool | None = None,
    ) -> list[Verdict]:
        """One verdict for each response, in order.

        Args:
          responses: completions without the end token.
          answers: the gold answer of each; LaTeX without dollar signs, or plain text.
          metas: the `meta` of each problem, for a `verify` that looks at it; default {}.
          require_format: default: the grader's.

        Returns:
          Verdicts with reward 1 for "correct" and 0 for "wrong", "unparsable" (empty, unreadable,
          too large to evaluate, a crash, or an exception in 'module:attribute'), "timeout", and
          "format" (only if it is required).

        Raises:
          ValueError: the lengths differ.
          UserError: a meta that is not JSON, where a worker needs it.
          RuntimeError: workers do not start; the message ends with what they wrote.
          CancelledError: `close` was called meanwhile.
        """
        metas = [{}] * len(answers) if metas is None else metas
        if not len(responses) == len(answers) == len(metas):
            counts = f"{len(responses)} responses but {len(answers)} answers and {len(metas)} metas"
            raise ValueError(counts)
        required = self.require_format if require_format is None else require_format
        return self._judge(self._find(responses, required), answers, metas, required)

    def grade_golds(self, golds: Sequence[str]) -> list[Verdict]:
        """Returns the verdicts on responses that answer with the gold answer itself, in the format.

        Only where a function finds the answers is none looked for: which response it would find
        them in is not known.
        """
        if self.form in FORMS:
            return self.grade([as_response(gold, str(self.form)) for gold in golds], golds)
        found: list[Found] = [(gold, None) for gold in golds]
        return self._judge(found, golds, [{}] * len(golds), self.require_format)

    def answers(
        self, responses: Sequence[str], *, require_format: bool | None = None
    ) -> list[str | None]:
        """Returns the answer of each response, None where it has none that can be graded.

        Args:
          require_format: default: the grader's.
        """
        required = self.require_format if require_format is None else require_format
        return [answer for answer, _ in self._find(responses, required)]

    def _find(self, responses: Sequence[str], required: bool) -> list[Found]:
        """Returns the answers, by worker processes where a name says what finds them.

        Args:
          required: whether a response without the format has no answer.
        """
        form = self.form
        if isinstance(form, str) and form in FORMS:
            read = functools.partial(final_answer, require_format=required, form=form)
            return [(read(response), None) for response in responses]
        parts = [answer_part(response) if required else response for response in responses]
        texts = dict.fromkeys(part for part in parts if part is not None)
        found: dict[str | None, Found] = {None: (None, None)}
        if self._readers:
            with self._lock:
                replies = self._readers.ask([(text,) for text in texts])
            found |= {text: replies[(text,)] for text in texts}
        elif callable(form):
            found |= {text: (form(text), None) for text in texts}
        return [found[part] for part in parts]

    def _judge(
        self,
        found: Sequence[Found],
        golds: Sequence[str],
        metas: Sequence[dict[str, Any]],
        required: bool,
    ) -> list[Verdict]:
        """Returns the verdicts on answers, by worker processes as far as they need one."""
        outcomes: list[Outcome | None] = []
        pairs: dict[int, Request] = {}
        for i, ((answer, failed), gold, meta) in enumerate(zip(found, golds, metas, strict=True)):
            outcome: Outcome | None
            pair: Request = ()
            if answer is None:
                outcome = failed or ("format" if required else "unparsable")
            elif self.verify is None:
                outcome, pair = _decide(answer, gold, as_text=self.form == "text")
            else:
                outcome, pair = _ask(self.verify, answer, gold, meta)
            outcomes.append(outcome)
            if outcome is None:
                pairs[i] = pair
        if pairs:
            with self._lock:
                verified = self._verify(dict.fromkeys(pairs.values()))
            for i, pair in pairs.items():
                outcomes[i] = verified[pair]
        return [_verdict(outcome) for outcome in outcomes if outcome is not None]

    def submit(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> Future[list[Verdict]]:
        """`grade` beside whatever the caller does meanwhile; in the order of the calls.

        At most MAX_WAITING calls wait; the next one blocks until the first of them is done.
        """
        if self._background is None:
            self._background = ThreadPoolExecutor(1, "grader")
        self._waiting.acquire()
        try:
            job = self._background.submit(self.grade, responses, answers, metas)
        except BaseException:
            self._waiting.release()
            raise
        job.add_done_callback(lambda _: self._waiting.release())
        return job

    def _verify(self, pairs: Iterable[Request]) -> dict[Request, Outcome]:
        """Outcomes of different pairs: remembered, or by worker processes."""
        done: dict[Request, Outcome] = {}
        new = []
        for pair in pairs:
            if pair in self._known:
                done[pair] = self._known[pair]
                self._known.move_to_end(pair)
            else:
                new.append(pair)
        asked = self._supervisor.ask(new)
        # Not a timeout: the machine may have been busy, so try again next time.
        self._known.update((p, o) for p, o in asked.items() if o != "timeout")
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return done | asked


class _Readers(Supervisor):
    """Workers that find answers in completions; a reply is a `Found`."""

    timed_out: Found = (None, "timeout")
    crashed: Found = (None, "unparsable")

    def understand(self, reply: Any) -> Any:
        """See `Supervisor`."""
        if isinstance(reply, dict) and reply.keys() == {"answer"}:
            answer = reply["answer"]
            return (answer, None) if answer is None or isinstance(answer, str) else None
        return self.crashed if super().understand(reply) == "unparsable" else None


def _decide(answer: str, gold: str, *, as_text: bool) -> tuple[Outcome | None, Request]:
    """The outcome as far as it needs no worker, else None and what to compare.

    Args:
      as_text: the answer may be prose, which is no product of its letters.
    """
    if not answer or len(answer) > max(MAX_BOX, 2 * len(gold)):
        return "unparsable", ()
    cleaned, wanted = clean(answer), clean(gold)
    if not cleaned:
        return "unparsable", ()
    if as_text and same_text(answer, gold):
        return "correct", ()
    if not same_unit(gold, answer):
        return "wrong", ()
    equal = quick_verdict(wanted, cleaned)
    if equal is None:
        if as_text and has_words(without_unit(cleaned)):
            return "wrong", ()
        if too_deep(cleaned):
            return "unparsable", ()
        return None, (without_unit(wanted), without_unit(cleaned))
    if not equal and len(cleaned) > MAX_LENGTH:
        return "unparsable", ()
    return "correct" if equal else "wrong", ()


def _ask(
    verify: Verifier | str, answer: str, gold: str, meta: dict[str, Any]
) -> tuple[Outcome | None, Request]:
    """The outcome by a task's verifier, or None and what to ask it in a worker."""
    if not answer:
        return "unparsable", ()
    if not isinstance(verify, str):
        return "correct" if verify(answer, gold, meta) else "wrong", ()
    try:
        return None, (gold, answer, json.dumps(meta, sort_keys=True))
    except TypeError as error:
        raise UserError(f"{verify}: the meta of a problem is not JSON: {error}") from error


def _verdict(outcome: Outcome) -> Verdict:
    return Verdict(1.0 if outcome == "correct" else 0.0, outcome)


@functools.cache
def _shared_grader() -> Grader:
    return Grader(workers=1)  # closes with the program


def grade(
    response: str, answer: str, *, require_format: bool = True, form: str = "boxed"
) -> Verdict:
    r"""The verdict on one response; `Grader.grade` is the way to grade many.

    Bounded in time whatever the response (`\boxed{9^{9^{9}}}`): what needs computer algebra runs
    in one shared worker process with a limit of 3 seconds, started at the first need (about a
    second) and ended with the program.

    Args:
      response: a completion without the end token.
      answer: the gold answer; LaTeX without dollar signs, or plain text.
      require_format: grade only a response that has the format (`has_format`), after whose
        `</think>` the answer is looked for. False: the last box, wherever it is.
      form: of the answer in the response, one of FORMS; see `format.final_answer`.

    Returns:
      Verdict with reward 1 for "correct", else 0; see `Grader.grade` for the outcomes.
    """
    found = final_answer(response, require_format=require_format, form=form)
    if found is None:
        return _verdict("format" if require_format else "unparsable")
    outcome, pair = _decide(found, answer, as_text=form == "text")
    if outcome is None:
        grader = _shared_grader()
        with grader._lock:
            outcome = grader._verify([pair])[pair]
    return _verdict(outcome)
