"""The engine for servers: any that speaks OpenAI's protocol, through the package ``openai``.

Conversations go to ``/chat/completions``, texts to ``/completions``. Requests run in an event loop of their own
thread, ``concurrency`` of them at once; rows are read, and results given, in the thread that asks for them.

====================================================  =========================================================
what comes back                                       what becomes of the row
====================================================  =========================================================
no connection, nothing in time, 408, 409, 425, 429,   asked again up to ``retries`` times, after pauses that
5xx, no JSON, no choices, choices that were aborted   double and honour Retry-After; then the stage stops, to be
                                                      continued later (:class:`EngineError`)
only completions without text                         asked again likewise; then refused: ``empty_completion``
fewer than n completions with text                    asked at once for the rest
400, 413, 422, stopped by a content filter            refused: ``refused_by_server``
any other status (401, 403, 404, …)                   the stage stops: it would be the same for all rows
====================================================  =========================================================

What is asked again is counted: ``retried_connection``, ``retried_timeout``, ``retried_rate_limit``,
``retried_server_error``, ``retried_bad_response``, ``retried_empty``, ``retried_incomplete`` (for the rest).
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import importlib.util
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timezone
from email.utils import parsedate_to_datetime
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from fastpo.data.formats import Message
from fastpo.plain_values import plain

from .base import Completion, EngineError, Prompt, Refused, Request, RequestBatch, Sampling

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from tenacity import RetryCallState

_T = TypeVar("_T")

FIRST_PAUSE = 1.0  # seconds before a request is made again; doubled each time
LONGEST_PAUSE = 60.0  # seconds, up to which pauses double
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more stops the stage
FIRST_REFUSALS = 10  # before anything is served: so many are no fault of the rows
MAX_CONCURRENCY = 1000  # connections that the client opens
SEEDS = 2**31  # servers take seeds below that
NO_KEY = "none"  # what is sent to a server without keys: the client wants one
WORDS = 300  # characters of what a server said that a message repeats

_OWN_FIELDS = (
    *("model", "messages", "prompt", "stream"),
    *("n", "temperature", "top_p", "max_tokens", "stop", "seed"),
)
_JITTER = random.Random()  # of its own: trouble with a server changes nobody else's draws
_ABORTED = ("abort", "error")  # finish reasons of servers that gave a completion up


class OpenAIEngine:
    """Completes prompts by a server.

    Args:
        model: name by which the server knows it.
        base_url: address, e.g. http://localhost:8000/v1; a user and password in it are sent as basic
            authentication and shown nowhere.
        api_key: sent as bearer token and shown nowhere; None: the server wants none.
        concurrency: requests under way at once, 1 to 1000.
        timeout: seconds until a request, as a whole, is given up and made again.
        retries: how often a request is made again.
        options: further fields of every request's body.

    ``Sampling.top_k`` and ``repetition_penalty`` are no part of OpenAI's own protocol: their fields are sent
    only where they do something. Servers may have defaults of their own for what is not sent (vLLM takes a
    checkpoint's generation settings); ``options``, e.g. ``{"top_k": -1}``, set them right.

    Each request is sent with its own seed; what is asked in addition, because completions were missing, gets
    the seed plus the number of completions that were there. Whether a server heeds seeds is its own affair.

    Servers count the tokens of all completions of a response together: each gets an equal share, so that sums
    are right. Without a count they are 0.

    Raises:
        ImportError: openai or tenacity is not installed.
        ValueError: a number out of range, an address that is none, a key that no header can hold, an option
            that the engine or ``Sampling`` sets.
    """

    batch_rows = 1

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
        options: dict[str, Any] | None = None,
    ) -> None:
        for package in ("openai", "tenacity"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"engine.kind 'openai': needs the package {package} (pip install 'fastpo[openai]')"
                )
        for name, value, good, expected in (
            ("concurrency", concurrency, 1 <= concurrency <= MAX_CONCURRENCY,
             f"an integer from 1 to {MAX_CONCURRENCY}"),
            ("timeout", timeout, 0 < timeout < float("inf"), "a number of seconds > 0"),
            ("retries", retries, retries >= 0, "an integer ≥ 0"),
        ):  # fmt: skip
            if not good:
                raise ValueError(f"engine.{name}: got {value!r}, expected {expected}")
        self.options = options or {}
        for name in _OWN_FIELDS:
            if name in self.options:
                raise ValueError(
                    f"engine.options.{name}: set by the engine and by sampling, not here"
                )
        self.model = model
        self.base_url, login = _split_address(base_url)
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self._key = _checked_key(api_key)
        self._headers = {}
        if login is not None:
            self._headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        self._loops: set[_EventLoop] = set()
        self._secrets = [s for s in (self._key, login and login.partition(":")[2]) if s]

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "openai",
            "model": self.model,
            "base_url": self.base_url,
            "options": plain(self.options),
        }

    def generate(
        self, batches: Iterable[RequestBatch], sampling: Sampling, counts: Counter[str]
    ) -> Iterator[tuple[int, list[Completion] | Refused]]:
        requests = (request for batch in batches for request in batch.requests)
        retried: SimpleQueue[str] = SimpleQueue()  # counts belong to the thread of the caller
        client = self._client()
        running: set[Future[_Outcome]] = set()
        refused: list[_Outcome] | None = []  # held back until a request is not refused; then None
        loop = _EventLoop(client)
        self._loops.add(loop)
        try:
            while True:
                # refusals come quickly: what is still under way may be served, before that no more is sent
                waits = refused is not None and len(refused) >= FIRST_REFUSALS
                room = 0 if waits else self.concurrency - len(running)
                for request in islice(requests, room):
                    running.add(loop.start(self._complete(client, request, sampling, retried)))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                _add_all(retried, counts)
                failures = [error for future in done if (error := future.exception()) is not None]
                outcomes = [future.result() for future in done if future.exception() is None]
                if refused is not None:
                    refused += outcomes
                    if all(outcome.words for outcome in outcomes):
                        outcomes = []
                    else:
                        outcomes, refused = refused, None
                for outcome in outcomes:
                    yield outcome.number, outcome.result
                if failures:  # after what is finished
                    raise failures[0]
        finally:
            loop.end()
            self._loops.discard(loop)
        refused = refused or []
        if len(refused) >= FIRST_REFUSALS:
            raise self._error(
                f"all of the first {len(refused)} requests were refused, the last one with "
                f"{refused[-1].words}; no row is left out for that"
            )
        for outcome in refused:
            yield outcome.number, outcome.result

    def close(self) -> None:
        """End the requests that are under way, where nobody has stopped listening to them."""
        for loop in [*self._loops]:
            loop.end()

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=self.base_url,
            default_headers=self._headers,
            timeout=None,  # the one clock is in _choices
            max_retries=0,
        )

    async def _complete(
        self,
        client: AsyncOpenAI,
        request: Request,
        sampling: Sampling,
        retried: SimpleQueue[str],
    ) -> _Outcome:
        """``sampling.n`` completions with text.

        Raises:
            EngineError: the server does not give them, for a reason that is not the request's.
        """
        from tenacity import AsyncRetrying, RetryError, retry_if_exception_type

        kept: list[Completion] = []
        drawn = 0  # completions that the server has given, those without text included

        async def ask() -> None:
            nonlocal drawn
            seed = (request.seed + drawn) % SEEDS
            given = await self._choices(client, request, sampling, sampling.n - len(kept), seed)
            drawn += len(given)
            usable = [completion for completion in given if completion.text.strip()]
            if not usable:
                raise _Trouble("empty", "a completion without text")
            kept.extend(usable)

        def count(state: RetryCallState) -> None:
            retried.put(f"retried_{_trouble(state).kind}")

        while True:
            asking = AsyncRetrying(
                retry=retry_if_exception_type(_Trouble),
                wait=_pause,
                stop=self._gives_up,
                before_sleep=count,
            )
            try:
                await asking(ask)
            except _Refusal as refusal:
                return _Outcome(request.number, Refused("refused_by_server"), refusal.words)
            except RetryError as error:
                trouble: Any = error.last_attempt.exception()
                if trouble.kind == "empty":
                    return _Outcome(request.number, Refused("empty_completion"))
                tried = error.last_attempt.attempt_number
                # from None, here and below: the client's exceptions hold the request, with its key
                raise self._error(
                    f"{trouble.words} (row {request.number}, attempt {tried} of {self.retries + 1}); finished "
                    "rows are kept, the same command goes on from there"
                ) from None
            if len(kept) == sampling.n:
                return _Outcome(request.number, kept)
            retried.put("retried_incomplete")

    async def _choices(
        self, client: AsyncOpenAI, request: Request, sampling: Sampling, n: int, seed: int
    ) -> list[Completion]:
        """What one request brings, 1 to ``n`` completions.

        Raises:
            EngineError: the server will not serve anyone so.
            _Refusal: it will not serve this request.
            _Trouble: it may serve it another time.
        """
        import openai

        further = {**self.options}
        if sampling.top_k is not None:
            further["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            further["repetition_penalty"] = sampling.repetition_penalty
        body: dict[str, Any] = {
            "model": self.model,
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            "extra_body": further,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if isinstance(request.prompt, str):
            call = client.completions.create(prompt=request.prompt, **body)
        else:
            call = client.chat.completions.create(messages=_messages(request.prompt), **body)
        try:
            response = await asyncio.wait_for(call, self.timeout)
        except asyncio.TimeoutError:
            raise _Trouble("timeout", f"no response within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Trouble("connection", self._without_secrets(_root_cause(error))) from None
        except openai.APIStatusError as error:
            raise self._judged(error, request.prompt) from None
        except (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError):
            raise _Trouble("bad_response", "a response that is no JSON") from None
        return _completions(response, n)

    def _judged(self, error: APIStatusError, prompt: Prompt) -> Exception:
        """What a status other than 200 means."""
        status = error.status_code
        words = self._without_secrets(_words(error.body))
        said = f"HTTP {status}" + (f" ({words})" if words else "")
        if status in (400, 413, 422) or error.code == "content_filter":
            return _Refusal(said)
        if status in (408, 409, 425, 429) or status >= 500:
            kind = {408: "timeout", 429: "rate_limit"}.get(status, "server_error")
            retry_after = _retry_after(error.response.headers.get("retry-after"))
            asks = "" if retry_after is None else f", which asks to wait for {retry_after:.0f} s"
            return _Trouble(kind, said + asks, retry_after)
        path = "completions" if isinstance(prompt, str) else "chat/completions"
        hint = {
            401: "; engine.api_key_env names the variable that holds the key",
            403: "; engine.api_key_env names the variable that holds the key",
            404: "; expected an address like http://localhost:8000/v1, and a model that the server knows",
        }.get(status, "")
        return self._error(f"{said} from /{path}{hint}")

    def _error(self, what: str) -> EngineError:
        return EngineError(f"{self.base_url}, model {self.model!r}: {what}")

    def _without_secrets(self, words: str) -> str:
        for secret in self._secrets:
            words = words.replace(secret, "***")
        words = " ".join(words.split())
        return words if len(words) <= WORDS else f"{words[:WORDS]}…"

    def _gives_up(self, state: RetryCallState) -> bool:
        return (
            state.attempt_number > self.retries
            or (_trouble(state).retry_after or 0) > LONGEST_RETRY_AFTER
        )


class _Outcome(NamedTuple):
    """What became of a request."""

    number: int
    result: list[Completion] | Refused
    words: str = ""  # of the server, where it refused the request


class _Trouble(Exception):
    """A request that may succeed another time."""

    def __init__(self, kind: str, words: str, retry_after: float | None = None) -> None:
        super().__init__(kind, words)
        self.kind = kind  # counted as retried_<kind>
        self.words = words
        self.retry_after = retry_after  # seconds


class _Refusal(Exception):
    """A request that the server will not serve."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


class _EventLoop:
    """An event loop in a thread of its own."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fastpo-openai", daemon=True)
        self._thread.start()
        self._ends = False
        # what nobody closed is closed after Python has stopped such threads, too late to wait for one
        atexit.register(self.end)

    def start(self, task: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def end(self) -> None:
        """Cancel all tasks, wherever they wait, and close the client. It may be asked more than once."""
        atexit.unregister(self.end)
        if not self._ends:
            self._ends = True
            self.start(self._end_tasks())
        # the garbage collector may ask for it in that thread, too
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _end_tasks(self) -> None:
        try:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            while tasks:
                for task in tasks:
                    task.cancel()
                # again: before Python 3.12 wait_for loses a cancellation that meets the response
                _, tasks = await asyncio.wait(tasks, timeout=0.1)
            await self._client.close()
            await self._loop.shutdown_asyncgens()
        finally:
            self._loop.stop()


def _add_all(names: SimpleQueue[str], counts: Counter[str]) -> None:
    while True:
        try:
            counts[names.get_nowait()] += 1
        except Empty:
            return


def _trouble(state: RetryCallState) -> _Trouble:
    """What the last attempt ended with."""
    outcome: Any = state.outcome
    return outcome.exception()


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: never fewer than the server asks for, and other ones for each request."""
    from tenacity import wait_exponential

    pause = wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)(state)
    return max(pause, _trouble(state).retry_after or 0.0) + _JITTER.uniform(0, pause / 2)


def _retry_after(header: str | None) -> float | None:
    """Seconds that a header ``Retry-After`` asks for, in seconds or as an HTTP date; None: it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (TypeError, ValueError):
            return None
        if date.tzinfo is None:  # written as -0000
            date = date.replace(tzinfo=timezone.utc)
        seconds = date.timestamp() - time.time()
    return max(0.0, seconds)


def _completions(response: Any, n: int) -> list[Completion]:
    """The first ``n`` completions of a response. The client does not check what servers send: this does.

    Raises:
        _Refusal: a content filter stopped one.
        _Trouble: there is none, or one was given up.
    """
    try:
        choices = response.choices[:n]
        usage = getattr(response, "usage", None)
        total = int(getattr(usage, "completion_tokens", None) or 0)
        read = [
            ((c.message.content if hasattr(c, "message") else c.text) or "", c.finish_reason)
            for c in choices
        ]
        texts = [text.encode(errors="replace").decode() for text, _ in read]  # half surrogate pairs
    except (AttributeError, TypeError, ValueError):
        raise _Trouble("bad_response", "a response without choices") from None
    reasons = [reason for _, reason in read]
    if "content_filter" in reasons:
        raise _Refusal("a content filter's stop")
    if not read or any(reason in _ABORTED for reason in reasons):
        raise _Trouble("bad_response", "a response without choices, or with aborted ones")
    share, rest = divmod(total, len(read))
    return [
        Completion(text, "length" if reason == "length" else "stop", share + (k < rest))
        for k, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]


def _messages(conversation: list[Message]) -> list[Message]:
    """Messages as the protocol has them: fastpo keeps arguments of tool calls as objects, not as JSON text."""
    return [
        {**message, "tool_calls": [_tool_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in conversation
    ]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function.get("arguments") or {})},
    }


def _words(body: object) -> str:
    """What a server said about an error, in its body or in the field ``error`` of that."""
    if isinstance(body, Mapping):
        found = body.get("message") or body.get("detail") or body
        return (
            found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        )
    return str(body or "")


def _root_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"no connection ({type(error).__name__}: {error})"


def _split_address(base_url: str | None) -> tuple[str, str | None]:
    """(address without login, ``user:password``).

    Raises:
        ValueError: not an http(s) address.
    """
    try:
        parts = urlsplit(base_url or "")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        shown = None if base_url is None else base_url.rpartition("@")[2]
        raise ValueError(
            f"engine.base_url: got {shown!r}, expected an address like http://localhost:8000/v1"
        ) from None
    address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    if parts.username is None:
        return address, None
    return address, f"{unquote(parts.username)}:{unquote(parts.password or '')}"


def _checked_key(key: str | None) -> str | None:
    """The key without white space around it; None if there is none.

    Raises:
        ValueError: characters that no header can hold; the message does not show them.
    """
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            "engine.api_key_env: the key holds characters that no key has; expected printable ASCII without "
            "spaces"
        )
    return key or None
