"""A server on loopback that speaks OpenAI's protocol, breaks it as it is told, and remembers every request."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fastpo.selfplay.engines import Completion, Request, RequestBatch, Sampling
from fastpo.selfplay.engines.transformers_engine import TransformersEngine

Model = Callable[[dict[str, Any]], list[Completion]]  # completions for a request's body


def echo(body: Mapping[str, Any]) -> list[Completion]:
    """What is said depends on the prompt and the seed; like vLLM, the k-th of n completions has seed + k."""
    return [
        Completion(f"{prompt_of(body)}|{body['seed'] + k}", "stop", 10) for k in range(body["n"])
    ]


def llama(engine: TransformersEngine) -> Model:
    """A real model behind the server."""
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> list[Completion]:
        prompt = body["prompt"] if "prompt" in body else body["messages"]
        sampling = Sampling(
            n=body["n"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body.get("top_k"),
            repetition_penalty=body.get("repetition_penalty", 1.0),
            max_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
        )
        batch = RequestBatch([Request(0, prompt, body["seed"])], body["seed"])
        with lock:
            [(_, completions)] = engine.generate([batch], sampling, Counter())
        assert isinstance(completions, list)
        return completions

    return answer


def prompt_of(body: Mapping[str, Any]) -> str:
    """The text to be continued, or the last message."""
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


@dataclass
class Status:
    """An error, after so many seconds."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None  # sent as JSON; None: {"error": {"message": …}}
    seconds: float = 0.0


@dataclass
class Raw:
    """Status 200 and this body, which is cut off where ``lost`` bytes are left."""

    body: str
    content_type: str = "application/json"
    lost: int = 0


@dataclass
class Close:
    """The connection is closed without a word."""


@dataclass
class Stall:
    """Nothing is sent for so many seconds, then the response."""

    seconds: float


@dataclass
class Drip:
    """The response comes byte by byte, so many seconds apart."""

    seconds: float


@dataclass
class Change:
    """The response, changed."""

    change: Callable[[dict[str, Any]], Any]


Fault = Status | Raw | Close | Stall | Drip | Change


@dataclass
class Seen:
    """A request."""

    path: str
    body: dict[str, Any]
    headers: Mapping[str, str]
    time: float  # of its arrival, seconds since the epoch

    @property
    def prompt(self) -> str:
        return prompt_of(self.body)


class OpenAIServer:
    """Serves ``/v1/chat/completions`` and ``/v1/completions`` until the end of the ``with`` block.

    Attributes:
        model: what answers.
        always: a fault of every response.
        crowd: a response waits, up to 5 s, until so many requests have been under way at once.
        seen: all requests, in the order in which they came.
        most: requests that were under way at once, at most.
        changed: notified of every request.
    """

    def __init__(self, model: Model = echo) -> None:
        self.model = model
        self.always: Fault | None = None
        self.crowd = 0
        self.seen: list[Seen] = []
        self.most = 0
        self.changed = threading.Condition()
        self._under_way = 0
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(self, prompt: str, *faults: Fault) -> None:
        """The next requests with that prompt meet these faults, one each."""
        self._faults[prompt].extend(faults)

    def prompts(self) -> list[str]:
        """Of all requests, in the order in which they came."""
        return [seen.prompt for seen in self.seen]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        data = handler.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client went away while it sent a request")
        body = json.loads(data)
        seen = Seen(handler.path, body, dict(handler.headers), time.time())
        with self.changed:
            self.seen.append(seen)
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            faults = self._faults[seen.prompt]
            fault = faults.popleft() if faults else self.always
            self.changed.notify_all()
        try:
            if self.crowd:
                with self.changed:
                    self.changed.wait_for(lambda: self.most >= self.crowd, 5)
                self._ended.wait(0.05)  # time for more to come, if the client sends more
            self._respond(handler, seen, fault)
        finally:
            with self.changed:
                self._under_way -= 1

    def _respond(self, handler: BaseHTTPRequestHandler, seen: Seen, fault: Fault | None) -> None:
        match fault:
            case Close():
                handler.close_connection = True
            case Status(code, headers, body, seconds):
                self._ended.wait(seconds)
                if body is None:
                    body = {"error": {"message": f"told to fail with {code}", "type": "test"}}
                _send(handler, code, json.dumps(body), headers=headers)
            case Raw(text, content_type, lost):
                _send(handler, 200, text, content_type, lost=lost)
            case _:
                if isinstance(fault, Stall):
                    self._ended.wait(fault.seconds)
                response = self._response(seen)
                if isinstance(fault, Change):
                    response = fault.change(response)
                pause = fault.seconds if isinstance(fault, Drip) else 0.0
                _send(handler, 200, json.dumps(response), pause=pause, ended=self._ended)

    def _response(self, seen: Seen) -> dict[str, Any]:
        completions = self.model(seen.body)
        chat = {"/v1/chat/completions": True, "/v1/completions": False}[seen.path]
        return {
            "id": "response-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": seen.body["model"],
            "choices": [
                {
                    "index": k,
                    "finish_reason": completion.finish_reason,
                    "logprobs": None,
                    **(
                        {"message": {"role": "assistant", "content": completion.text}}
                        if chat
                        else {"text": completion.text}
                    ),
                }
                for k, completion in enumerate(completions)
            ],
            "usage": {"completion_tokens": sum(completion.tokens for completion in completions)},
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _send(
    handler: BaseHTTPRequestHandler,
    code: int,
    text: str,
    content_type: str = "application/json",
    *,
    headers: Mapping[str, str] | None = None,
    lost: int = 0,
    pause: float = 0.0,
    ended: threading.Event | None = None,
) -> None:
    data = text.encode()
    handler.send_response(code)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    if pause and ended is not None:
        for k in range(len(data)):
            handler.wfile.write(data[k : k + 1])
            if ended.wait(pause):
                break
    else:
        handler.wfile.write(data[: len(data) - lost])
    handler.close_connection = bool(lost)


def without_choices(response: dict[str, Any]) -> dict[str, Any]:
    return {**response, "choices": []}


def first_choices(n: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A server that gives fewer than it was asked for."""
    return lambda response: {**response, "choices": response["choices"][:n]}


def with_text(text: str | None, *numbers: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """These completions, or all, say something else."""

    def change(response: dict[str, Any]) -> dict[str, Any]:
        for k, choice in enumerate(response["choices"]):
            if not numbers or k in numbers:
                if "message" in choice:
                    choice["message"]["content"] = text
                else:
                    choice["text"] = text
        return response

    return change


def with_reason(reason: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """All completions ended so."""

    def change(response: dict[str, Any]) -> dict[str, Any]:
        for choice in response["choices"]:
            choice["finish_reason"] = reason
        return response

    return change
