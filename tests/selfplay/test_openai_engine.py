"""The engine for servers against a real one on loopback, which fails as it is told."""

from __future__ import annotations

import base64
import json
import logging
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from openai_server import (
    Change,
    Close,
    Drip,
    Fault,
    OpenAIServer,
    Raw,
    Stall,
    Status,
    echo,
    first_choices,
    llama,
    with_reason,
    with_text,
    without_choices,
)

from fastpo.demo.model import build_model, build_tokenizer
from fastpo.selfplay.engines import (
    Completion,
    EngineError,
    EngineSettings,
    Prompt,
    Refused,
    Request,
    RequestBatch,
    Sampling,
    make_engine,
)
from fastpo.selfplay.engines import openai_engine as module
from fastpo.selfplay.engines.openai_engine import OpenAIEngine
from fastpo.selfplay.engines.transformers_engine import TransformersEngine
from fastpo.selfplay.manifest import Manifest
from fastpo.selfplay.rows import read_rows, write_rows
from fastpo.selfplay.stage import Batch, Result, Work, run_stage, seed_of

Results = dict[int, list[Completion] | Refused]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy before the loopback, and no long pauses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as started:
        yield started


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2
    while (left := client_threads()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def client_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("fastpo-openai", "asyncio"))]


def engine_for(server: OpenAIServer, **settings: Any) -> OpenAIEngine:
    arguments: dict[str, Any] = {"base_url": server.url, "timeout": 30.0, "retries": 3}
    return OpenAIEngine("tiny", **arguments | settings)


def batches(prompts: Sequence[Prompt], seed: int = 0) -> Iterator[RequestBatch]:
    """Row k's request has the seed ``seed + 100 k``."""
    for k, prompt in enumerate(prompts):
        yield RequestBatch([Request(k, prompt, seed + 100 * k)], 0)


def complete(
    engine: OpenAIEngine,
    prompts: list[str],
    counts: Counter[str] | None = None,
    seed: int = 0,
    **sampling: Any,
) -> Results:
    results = list(
        engine.generate(
            batches(prompts, seed), Sampling(**sampling), Counter() if counts is None else counts
        )
    )
    assert len({number for number, _ in results}) == len(results)  # none twice
    return dict(results)


def texts(made: list[Completion] | Refused) -> list[str]:
    assert not isinstance(made, Refused)
    return [completion.text for completion in made]


def echoed(prompt: str, *seeds: int) -> list[Completion]:
    return [Completion(f"{prompt}|{seed}", "stop", 10) for seed in seeds]


# What is sent, what comes back


def test_fields_of_a_request(server: OpenAIServer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    sampling = Sampling(
        n=2,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.1,
        max_tokens=9,
        stop=("a", "b"),
    )
    engine = engine_for(server, options={"guided_regex": "x*"})
    requests = [RequestBatch([Request(3, chat, 2**62 + 11), Request(5, "Once", 2**31 - 1)], 0)]
    results = dict(engine.generate(requests, sampling, Counter()))
    common = {
        "model": "tiny", "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "stop": ["a", "b"],
        "top_k": 40, "repetition_penalty": 1.1, "guided_regex": "x*",
    }  # fmt: skip
    bodies = {seen.path: seen.body for seen in server.seen}
    assert bodies == {
        "/v1/chat/completions": {**common, "seed": 11, "messages": chat},
        "/v1/completions": {**common, "seed": 2**31 - 1, "prompt": "Once"},
    }
    assert results == {3: echoed("Why?", 11, 12), 5: echoed("Once", 2**31 - 1, 2**31)}


def test_what_is_off_is_not_sent(server: OpenAIServer) -> None:
    complete(engine_for(server), ["x"], temperature=0, max_tokens=3)
    assert server.seen[0].body == {
        "model": "tiny", "prompt": "x", "n": 1, "temperature": 0, "top_p": 1.0, "max_tokens": 3, "seed": 0,
    }  # fmt: skip


def test_arguments_of_tool_calls_are_sent_as_text(server: OpenAIServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat: Prompt = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    list(engine_for(server).generate(batches([chat]), Sampling(), Counter()))
    [sent] = server.seen[0].body["messages"][0]["tool_calls"]
    assert sent == {**call, "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}  # the row's own stays


def test_finish_reasons_and_tokens(server: OpenAIServer) -> None:
    def model(body: dict[str, Any]) -> list[Completion]:
        return [
            Completion("a", "length", 4),
            Completion("b", "eos_token", 4),
            Completion("c", "stop", 3),
        ]

    server.model = model
    expected = [
        Completion("a", "length", 4),
        Completion("b", "stop", 4),
        Completion("c", "stop", 3),
    ]
    assert complete(engine_for(server), ["x"], n=3) == {0: expected}
    server.always = Change(lambda response: response | {"usage": None})
    assert complete(engine_for(server), ["x"], n=3) == {0: [c._replace(tokens=0) for c in expected]}


def test_the_tokens_of_a_row_sum_up(server: OpenAIServer) -> None:
    server.always = Change(lambda response: response | {"usage": {"completion_tokens": 11}})
    [made] = complete(engine_for(server), ["x"], n=3).values()
    assert isinstance(made, list)
    assert [completion.tokens for completion in made] == [4, 4, 3]


def test_half_surrogate_pairs_can_be_written(server: OpenAIServer) -> None:
    server.always = Change(with_text("half \ud83d"))
    [text] = texts(complete(engine_for(server), ["x"])[0])
    assert text.encode() == b"half ?"


def test_a_tiny_llama_behind_the_server(server: OpenAIServer, tmp_path: Path) -> None:
    """Over the wire comes what the model gives in this process."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    build_model(tokenizer, hidden_size=16, layers=1, seed=3).save_pretrained(tmp_path)
    local = TransformersEngine(str(tmp_path), batch_size=1, device="cpu")
    server.model = llama(local)
    prompts: list[Prompt] = ["Once upon", [{"role": "user", "content": "Why?"}], "1 + 1"]
    sampling = Sampling(n=2, temperature=0.8, top_k=30, max_tokens=12, stop=("e",))
    remote = dict(
        make_engine(EngineSettings("openai", "tiny", base_url=server.url)).generate(
            batches(prompts, 17), sampling, Counter()
        )
    )
    expected = dict(
        local.generate(
            (RequestBatch(b.requests, b.requests[0].seed) for b in batches(prompts, 17)),
            sampling,
            Counter(),
        )
    )
    assert {k: texts(made) for k, made in remote.items()} == {
        k: texts(made) for k, made in expected.items()
    }
    assert len({text for made in expected.values() for text in texts(made)}) == 6  # all different
    for k, made in expected.items():
        there = remote[k]
        assert isinstance(made, list)
        assert isinstance(there, list)
        assert [c.finish_reason for c in there] == [c.finish_reason for c in made]
        assert sum(c.tokens for c in there) == sum(c.tokens for c in made)


# Trouble that passes


def fault_name(value: Any) -> str:
    """Of a parameter, the same in every process."""
    kind = type(value).__name__
    if isinstance(value, Status):
        return f"{kind}{value.code}"
    return str(value) if isinstance(value, str | int) else kind


@pytest.mark.parametrize(
    ("fault", "kind", "drawn"),
    [
        (Close(), "connection", 0),
        (Raw("x" * 300, lost=100), "connection", 0),
        (Stall(1.5), "timeout", 0),
        (Drip(0.02), "timeout", 0),  # each byte in time, the whole not
        (Status(408), "timeout", 0),
        (Status(429), "rate_limit", 0),
        (Status(429, {"Retry-After": "soon"}), "rate_limit", 0),
        (Status(500), "server_error", 0),
        (Status(503, body="busy"), "server_error", 0),
        (Status(409), "server_error", 0),
        (Raw('{"choices": [{"mess'), "bad_response", 0),
        (Raw("<html>", "text/html"), "bad_response", 0),
        (Raw("null"), "bad_response", 0),
        (Raw("[]"), "bad_response", 0),
        (Raw('{"choices": null}'), "bad_response", 0),
        (Raw('{"choices": [{"text": [1], "finish_reason": "stop"}]}'), "bad_response", 0),
        (Change(without_choices), "bad_response", 0),
        (Change(with_reason("abort")), "bad_response", 0),
        (Change(with_text("")), "empty", 2),
        (Change(with_text(None)), "empty", 2),
        (Change(with_text(" \n")), "empty", 2),
    ],
    ids=fault_name,
)
def test_what_fails_once_is_asked_again(
    server: OpenAIServer, fault: Fault, kind: str, drawn: int
) -> None:
    """A completion without text is drawn anew: its seed would only bring it again."""
    server.fail("b", fault)
    counts: Counter[str] = Counter()
    timeout = 0.6 if isinstance(fault, Stall | Drip) else 30.0
    results = complete(engine_for(server, timeout=timeout), ["a", "b", "c"], counts, n=2)
    assert results == {
        0: echoed("a", 0, 1),
        1: echoed("b", 100 + drawn, 101 + drawn),
        2: echoed("c", 200, 201),
    }
    assert Counter(server.prompts()) == {"a": 1, "b": 2, "c": 1}
    assert counts == {f"retried_{kind}": 1}


def test_random_trouble_loses_nothing(server: OpenAIServer, seed: int) -> None:
    draw = random.Random(seed)
    faults: list[tuple[Fault, str]] = [
        (Close(), "connection"),
        (Status(500), "server_error"),
        (Status(429, {"Retry-After": "0"}), "rate_limit"),
        (Raw("{"), "bad_response"),
        (Change(with_text("")), "empty"),
    ]
    prompts = [f"prompt {k}" for k in range(40)]
    expected: Counter[str] = Counter()
    empty = dict.fromkeys(prompts, 0)
    for prompt in prompts:
        for fault, kind in draw.choices(faults, k=draw.randrange(4)):
            server.fail(prompt, fault)
            expected[f"retried_{kind}"] += 1
            empty[prompt] += kind == "empty"
    counts: Counter[str] = Counter()
    results = complete(engine_for(server, concurrency=8), prompts, counts)
    assert results == {k: echoed(p, 100 * k + empty[p]) for k, p in enumerate(prompts)}
    assert counts == expected


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts, which are not made."""
    made: list[float] = []

    def record(state: Any, pause: Callable[[Any], float] = module._pause) -> float:
        made.append(pause(state))
        return 0.0

    monkeypatch.setattr(module, "_pause", record)
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    return made


def test_pauses_double_up_to_the_longest(server: OpenAIServer, pauses: list[float]) -> None:
    server.fail("x", *[Status(500)] * 9)
    complete(engine_for(server, retries=9), ["x"])
    for pause, least in zip(pauses, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
        assert least <= pause <= 1.5 * least


def test_pauses_of_requests_differ(server: OpenAIServer, pauses: list[float]) -> None:
    prompts = [f"{k}" for k in range(8)]
    for prompt in prompts:
        server.fail(prompt, Status(429, {"Retry-After": "9"}))
    complete(engine_for(server), prompts)
    assert len(set(pauses)) == 8
    assert all(9 <= pause <= 9.5 for pause in pauses)


def test_draws_of_others_are_left_alone(server: OpenAIServer) -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    server.fail("x", Status(500))
    complete(engine_for(server), ["x"])
    assert random.random() == expected


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_in_seconds(server: OpenAIServer, code: int) -> None:
    server.fail("x", Status(code, {"Retry-After": "1"}))
    assert complete(engine_for(server), ["x"]) == {0: echoed("x", 0)}
    first, second = (seen.time for seen in server.seen)
    assert 1.0 <= second - first < 5.0


def test_retry_after_as_a_date(server: OpenAIServer) -> None:
    until = int(time.time()) + 2  # in more than a second
    server.fail("x", Status(429, {"Retry-After": formatdate(until, usegmt=True)}))
    assert complete(engine_for(server), ["x"]) == {0: echoed("x", 0)}
    assert until <= server.seen[1].time < until + 4


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("nan", 0.0), ("", None), ("soon", None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)  # fmt: skip
def test_retry_after_is_read(header: str | None, seconds: float | None) -> None:
    assert module._retry_after(header) == seconds


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XYZ-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0000"])
def test_retry_after_dates_are_read(far_from_greenwich: None, zone: str) -> None:
    date = formatdate(time.time() + 100, usegmt=True).replace("GMT", zone)
    assert module._retry_after(date) == pytest.approx(100, abs=1.5)


def test_a_server_that_asks_for_hours_is_not_waited_for(server: OpenAIServer) -> None:
    server.fail("x", Status(429, {"Retry-After": "7200"}))
    with pytest.raises(EngineError, match=r"HTTP 429 .*asks to wait for 7200 s .*attempt 1 of 4"):
        complete(engine_for(server), ["x"])
    assert len(server.seen) == 1


# Too few completions


def test_servers_that_give_one_at_a_time(server: OpenAIServer) -> None:
    """As many more requests as are needed, whatever ``retries`` is, and the completions that were due."""
    server.always = Change(first_choices(1))
    counts: Counter[str] = Counter()
    results = complete(engine_for(server, retries=0), ["a", "b"], counts, n=5)
    assert texts(results[0]) == [f"a|{k}" for k in range(5)]
    assert texts(results[1]) == [f"b|{100 + k}" for k in range(5)]
    assert [s.body["n"] for s in server.seen if s.prompt == "a"] == [5, 4, 3, 2, 1]
    assert counts == {"retried_incomplete": 8}


def test_more_than_n_are_cut(server: OpenAIServer) -> None:
    server.always = Change(lambda r: r | {"choices": r["choices"] * 3})
    assert len(complete(engine_for(server), ["x"], n=2)[0]) == 2


def test_completions_without_text_are_drawn_again(server: OpenAIServer) -> None:
    server.fail("x", Change(with_text("", 0, 2)))
    counts: Counter[str] = Counter()
    results = complete(engine_for(server), ["x"], counts, n=4)
    assert results == {0: echoed("x", 1, 3, 4, 5)}
    assert [seen.body["n"] for seen in server.seen] == [4, 2]
    assert counts == {"retried_incomplete": 1}


def test_a_prompt_that_brings_no_text_is_refused(server: OpenAIServer) -> None:
    server.fail("b", *[Change(with_text(""))] * 3)
    counts: Counter[str] = Counter()
    results = complete(engine_for(server, retries=2), ["a", "b", "c"], counts)
    assert results == {0: echoed("a", 0), 1: Refused("empty_completion"), 2: echoed("c", 200)}
    assert counts == {"retried_empty": 2}
    assert server.prompts().count("b") == 3


# Refusals


@pytest.mark.parametrize(
    "fault",
    [
        Status(400),
        Status(413),
        Status(422, body={"detail": [{"msg": "too long"}]}),
        Status(403, body={"error": {"message": "no", "code": "content_filter"}}),
        Change(with_reason("content_filter")),
    ],
    ids=fault_name,
)
def test_what_the_server_refuses_is_not_asked_again(server: OpenAIServer, fault: Fault) -> None:
    server.fail("b", fault)
    counts: Counter[str] = Counter()
    results = complete(engine_for(server), ["a", "b", "c"], counts)
    assert results == {0: echoed("a", 0), 1: Refused("refused_by_server"), 2: echoed("c", 200)}
    assert server.prompts().count("b") == 1
    assert not counts


@pytest.mark.parametrize(
    ("code", "hint"), [(401, "api_key_env"), (403, "api_key_env"), (404, "a model"), (402, "")]
)
def test_what_is_the_same_for_all_rows_stops_at_once(
    server: OpenAIServer, code: int, hint: str
) -> None:
    server.always = Status(code, body={"error": {"message": "no such thing"}})
    with pytest.raises(EngineError) as caught:
        complete(engine_for(server, concurrency=2), [f"{k}" for k in range(20)])
    message = str(caught.value)
    for part in (server.url, "'tiny'", str(code), "no such thing", "/completions", hint):
        assert part in message
    assert len(server.seen) <= 2


@pytest.mark.parametrize("body", [{"detail": "no route"}, "no route", {"message": "no route"}])
def test_the_words_of_other_servers(server: OpenAIServer, body: Any) -> None:
    server.always = Status(404, body=body)
    with pytest.raises(EngineError, match=r"HTTP 404 \(\"?no route\"?\) from /completions;"):
        complete(engine_for(server), ["x"])


def test_long_words_are_cut(server: OpenAIServer) -> None:
    server.always = Status(404, body="<p>\n" * 10000)
    with pytest.raises(EngineError) as caught:
        complete(engine_for(server), ["x"])
    assert len(str(caught.value)) < 600


def test_refusals_from_the_first_on_stop_the_stage(server: OpenAIServer) -> None:
    server.always = Status(400, body={"error": {"message": "max_tokens is not supported"}})
    results = engine_for(server, concurrency=4).generate(
        batches([f"{k}" for k in range(100)]), Sampling(), Counter()
    )
    with pytest.raises(EngineError, match=r"first 1\d requests .*HTTP 400 \(max_tokens is not"):
        next(results)  # no row is blamed for it
    assert 10 <= len(server.seen) <= 14


def test_refusals_count_until_the_first_success(server: OpenAIServer) -> None:
    prompts = [f"{k}" for k in range(40)]
    for prompt in prompts[:9] + prompts[10:]:
        server.fail(prompt, Status(400))
    results = complete(engine_for(server, concurrency=1), prompts)
    refused = Refused("refused_by_server")
    assert results == {k: refused if k != 9 else echoed("9", 900) for k in range(40)}


def test_slow_service_is_no_refusal(server: OpenAIServer) -> None:
    """Refusals come quickly; while one of the first requests is under way, nothing is decided, or sent."""
    prompts = [f"{k}" for k in range(40)]
    for prompt in prompts[1:]:
        server.fail(prompt, Status(400))
    server.fail("0", Stall(0.5))
    results = engine_for(server, concurrency=4).generate(batches(prompts), Sampling(), Counter())
    first = next(results)
    assert 11 <= len(server.seen) <= 13
    refused = Refused("refused_by_server")
    assert dict([first, *results]) == {0: echoed("0", 0)} | dict.fromkeys(range(1, 40), refused)


def test_few_rows_may_all_be_refused(server: OpenAIServer) -> None:
    server.always = Status(400)
    results = complete(engine_for(server), ["a", "b", "c"])
    assert results == {k: Refused("refused_by_server") for k in range(3)}


# Trouble that does not pass


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Close(), "connection", "no connection"),
        (Stall(5.0), "timeout", "no response within 0.2 s"),
        (Status(500), "server_error", "HTTP 500 (told to fail with 500)"),
        (Status(429), "rate_limit", "HTTP 429"),
        (Raw("{"), "bad_response", "no JSON"),
    ],
    ids=fault_name,
)
def test_exhausted_retries_stop_the_stage(
    server: OpenAIServer, fault: Fault, kind: str, words: str
) -> None:
    server.always = fault
    counts: Counter[str] = Counter()
    timeout = 0.2 if isinstance(fault, Stall) else 30.0
    with pytest.raises(EngineError) as caught:
        complete(engine_for(server, timeout=timeout, retries=2), ["x"], counts)
    for part in (server.url, "'tiny'", words, "row 0, attempt 3 of 3", "rows are kept"):
        assert part in str(caught.value)
    assert counts == {f"retried_{kind}": 2}
    assert len(server.seen) == 3


def test_no_server(server: OpenAIServer) -> None:
    with OpenAIServer() as other:
        url = other.url
    counts: Counter[str] = Counter()
    with pytest.raises(
        EngineError, match=r"no connection \(ConnectionRefusedError.*attempt 2 of 2"
    ):
        complete(engine_for(server, base_url=url, retries=1), ["x"], counts)
    assert counts == {"retried_connection": 1}


def test_what_is_finished_is_given_before_the_error(server: OpenAIServer) -> None:
    """While the caller works on row 0, rows 1 to 4 become done, and row 5 fails."""
    prompts = [f"{k}" for k in range(6)]
    for prompt in prompts[1:5]:
        server.fail(prompt, Stall(0.2))
    server.fail("5", Status(401, seconds=0.2))
    given: list[int] = []

    def work_on_all() -> None:
        for number, _ in engine_for(server).generate(batches(prompts), Sampling(), Counter()):
            if not given:
                time.sleep(1.0)
            given.append(number)

    with pytest.raises(EngineError, match="HTTP 401"):
        work_on_all()
    assert given[0] == 0
    assert sorted(given) == [0, 1, 2, 3, 4]


# Stages


def stage(
    rows: Path, output: Path, engine: OpenAIEngine, sampling: Sampling, seed: int = 5
) -> Manifest:
    def run(stage_batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        def requests() -> Iterator[RequestBatch]:
            for batch in stage_batches:
                yield RequestBatch(
                    [
                        Request(i.number, i.row["prompt"], seed_of(batch.seed, i.number))
                        for i in batch.items
                    ],
                    batch.seed,
                )

        for number, made in engine.generate(requests(), sampling, counts):
            if isinstance(made, Refused):
                yield Result(number, None, made.reason)
            else:
                yield Result(number, {"responses": [c.text for c in made]})

    work = Work(run, engine.batch_rows)
    settings = {"engine": engine.identity()}
    return run_stage("test", output, {"rows": rows}, settings, work, seed=seed, quiet=True)


def test_a_stage_goes_on_where_the_server_left_it(server: OpenAIServer, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    prompts = [f"prompt {k}" for k in range(30)]
    write_rows(rows, ({"prompt": prompt} for prompt in prompts))
    server.fail("prompt 4", Status(400))
    server.fail("prompt 7", Status(500))
    server.fail("prompt 17", *[Status(503)] * 4)
    engine = engine_for(server, concurrency=3)
    with pytest.raises(EngineError, match=r"HTTP 503 .*\(row 17, attempt 4 of 4\)"):
        stage(rows, output, engine, Sampling(n=2))
    assert not output.exists()
    journal = (tmp_path / "out.jsonl.partial" / "journal.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in journal]
    done = {prompts[entry["i"]] for entry in entries if "i" in entry}
    assert 14 <= len(done) < 30
    before = len(server.seen)

    manifest = stage(rows, output, engine_for(server, concurrency=7), Sampling(n=2))
    assert Counter(s.prompt for s in server.seen[before:]) == Counter(
        {*prompts} - done
    )  # once each
    made = [row for _, row in read_rows(output)]
    assert [row["prompt"] for row in made] == [p for k, p in enumerate(prompts) if k != 4]
    seeds = {s.prompt: s.body["seed"] for s in server.seen}
    for row in made:
        seed = seeds[row["prompt"]]
        assert row["responses"] == [f"{row['prompt']}|{seed + k}" for k in range(2)]
    assert len(set(seeds.values())) == 30
    assert manifest.counts["in"] == 30
    assert manifest.counts["out"] == 29
    assert manifest.counts["refused_by_server"] == 1
    assert manifest.counts["retried_server_error"] >= 1
    assert stage(rows, output, engine, Sampling(n=2)) == manifest  # nothing left to ask
    assert len(server.seen) == before + 30 - len(done)


def test_stopped_or_not_the_output_is_the_same(server: OpenAIServer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, ({"prompt": f"prompt {k}"} for k in range(12)))
    server.fail("prompt 6", *[Close()] * 2)
    for name, concurrency in (("a.jsonl", 1), ("b.jsonl", 5)):
        engine = engine_for(server, concurrency=concurrency, retries=1)
        if name == "a.jsonl":
            with pytest.raises(EngineError):
                stage(rows, tmp_path / name, engine, Sampling(n=3))
        stage(rows, tmp_path / name, engine, Sampling(n=3))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


# Concurrency


def test_concurrency_is_used_and_bounded(server: OpenAIServer) -> None:
    server.crowd = 6
    prompts = [f"{k}" for k in range(24)]
    results = complete(engine_for(server, concurrency=6), prompts)
    assert results == {k: echoed(p, 100 * k) for k, p in enumerate(prompts)}
    assert server.most == 6


def test_rows_are_read_as_they_are_needed(server: OpenAIServer) -> None:
    read = 0
    caller = threading.current_thread()

    def lazily() -> Iterator[RequestBatch]:
        nonlocal read
        for k in range(10):
            assert threading.current_thread() is caller  # a stage's journal knows no other thread
            read += 3
            yield RequestBatch([Request(3 * k + j, f"{3 * k + j}", 0) for j in range(3)], 0)

    results = engine_for(server, concurrency=4).generate(lazily(), Sampling(), Counter())
    assert read == 0
    for given, _ in enumerate(results, 1):
        assert read <= given + 4 + 2  # two more: the rest of a batch
        time.sleep(0.005)
    assert read == 30


def test_a_slow_row_holds_up_no_other(server: OpenAIServer) -> None:
    def model(body: dict[str, Any]) -> list[Completion]:
        if body["prompt"] == "0":
            with server.changed:
                assert server.changed.wait_for(lambda: len(server.seen) == 10, 10)
        return echo(body)

    server.model = model
    results = engine_for(server, concurrency=2).generate(
        batches([f"{k}" for k in range(10)]), Sampling(), Counter()
    )
    order = [number for number, _ in results]
    assert order.index(0) >= 8
    assert sorted(order) == list(range(10))


def test_a_slow_consumer_costs_no_timeout(server: OpenAIServer) -> None:
    """Requests run on while results are worked on."""
    server.fail("1", Stall(0.2))
    counts: Counter[str] = Counter()
    engine = engine_for(server, concurrency=2, timeout=1.0)
    for number, _ in engine.generate(batches(["0", "1"]), Sampling(), counts):
        if number == 0:
            time.sleep(1.3)
    assert not counts
    assert len(server.seen) == 2


@pytest.mark.parametrize("where", ["stalled", "pausing"])
def test_who_stops_listening_waits_for_nobody(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "pausing":
        monkeypatch.setattr(module, "FIRST_PAUSE", 30.0)
    for prompt in ("1", "2", "3"):
        server.fail(prompt, Stall(30) if where == "stalled" else Status(500))
    results = engine_for(server, concurrency=4, timeout=60).generate(
        batches([f"{k}" for k in range(9)]), Sampling(), Counter()
    )
    assert next(results)[0] == 0
    assert client_threads()
    start = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 10
    assert "fastpo-openai" not in client_threads()
    assert len(server.seen) <= 5


def test_a_closed_engine_waits_for_nobody(server: OpenAIServer) -> None:
    server.fail("1", Stall(30))
    engine = engine_for(server, timeout=60)
    results = engine.generate(batches(["0", "1"]), Sampling(), Counter())
    assert next(results)[0] == 0
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 10
    assert "fastpo-openai" not in client_threads()
    engine.close()
    assert complete(engine, ["2"]) == {0: echoed("2", 0)}  # it can be used again


def test_an_event_loop_may_be_ended_from_within(server: OpenAIServer) -> None:
    """The garbage collector closes what nobody closed, in whatever thread it runs."""
    loop = module._EventLoop(engine_for(server)._client())

    async def collected() -> None:
        loop.end()

    assert loop.start(collected()).result(10) is None
    loop._thread.join(10)
    assert "fastpo-openai" not in client_threads()


ABANDONED = """
import sys
from collections import Counter
from fastpo.selfplay.engines import Request, RequestBatch, Sampling
from fastpo.selfplay.engines.openai_engine import OpenAIEngine

engine = OpenAIEngine("tiny", base_url=sys.argv[1], timeout=300)
batches = [RequestBatch([Request(k, str(k), 0) for k in range(3)], 0)]
results = engine.generate(batches, Sampling(), Counter())
print(next(results)[0], flush=True)
"""


def test_python_ends_although_nobody_closed_the_results(server: OpenAIServer) -> None:
    server.fail("1", Stall(300))
    server.fail("2", Stall(300))
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED, server.url], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "0\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_error_stops_what_is_under_way(server: OpenAIServer) -> None:
    for prompt in ("0", "1"):
        server.fail(prompt, Stall(30))
    server.fail("2", Status(401))
    start = time.monotonic()
    with pytest.raises(EngineError, match="HTTP 401"):
        complete(engine_for(server, concurrency=3, timeout=60), ["0", "1", "2", "3"])
    assert time.monotonic() - start < 10
    assert "fastpo-openai" not in client_threads()


def test_an_error_of_the_rows_stops_the_requests(server: OpenAIServer) -> None:
    def rows() -> Iterator[RequestBatch]:
        yield from batches(["0"])
        raise ValueError("rows.jsonl, line 2: not JSON")

    server.fail("0", Stall(30))
    start = time.monotonic()
    with pytest.raises(ValueError, match="line 2"):
        list(engine_for(server, timeout=60).generate(rows(), Sampling(), Counter()))
    assert time.monotonic() - start < 10


# Keys and settings

KEY = "sk-very-secret-0123456789"


def test_the_key_is_sent_and_shown_nowhere(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = engine_for(server, api_key=f" {KEY}\n")
    complete(engine, ["x"])
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    shown = [repr(engine), str(engine.identity())]
    for code in (400, 401, 500):
        server.always = Status(code, body={"error": {"message": f"the key {KEY} is wrong"}})
        with pytest.raises(EngineError, match=r"the key \*\*\* is wrong") as caught:
            complete(engine, [f"{k}" for k in range(10)])
        shown.append(str(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert KEY not in "".join(shown) + caplog.text


def test_logins_in_the_address_are_sent_and_shown_nowhere(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = server.url.replace("://", "://me:pa%2Fss@word@")
    engine = engine_for(server, base_url=address)
    complete(engine, ["x"])
    sent = server.seen[0].headers["authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")).decode() == "me:pa/ss@word"
    server.always = Status(404, body={"detail": "me:pa/ss@word?"})
    with pytest.raises(EngineError) as caught:
        complete(engine, ["x"])
    shown = f"{caught.value} {engine!r} {engine.identity()} {caplog.text}"
    assert server.url in shown
    for secret in ("pa/ss", "pa%2Fss", "ss@word"):
        assert secret not in shown


def test_servers_without_keys(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the key of another server")
    for key in (None, "", " "):
        complete(engine_for(server, api_key=key), ["x"])
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer none"}


def test_the_key_comes_from_the_environment(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    settings = EngineSettings("openai", base_url=server.url, api_key_env="MY_KEY", concurrency=1)
    results = list(make_engine(settings, "policy").generate(batches(["x"]), Sampling(), Counter()))
    assert results == [(0, echoed("x", 0))]
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.seen[0].body["model"] == "policy"


def test_identity() -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        return OpenAIEngine("m", **{"base_url": "https://host:1/v1/"} | settings).identity()

    found = identity(options={"top_k": -1, "api_key": "x"})
    assert found == {
        "kind": "openai",
        "model": "m",
        "base_url": "https://host:1/v1",
        "options": {"top_k": -1},
    }
    assert identity() == identity(
        base_url="https://me:pw@host:1/v1", api_key=KEY, concurrency=3, timeout=1, retries=0
    )
    assert identity() != identity(options={"min_p": 0.1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_url": None},
            r"base_url: got None, expected an address like http://localhost:8000/v1",
        ),
        ({"base_url": ""}, "base_url"),
        ({"base_url": "localhost:8000/v1"}, "base_url: got 'localhost:8000/v1'"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"base_url": "http://host/v1?key=3"}, "base_url"),
        ({"concurrency": 0}, "concurrency: got 0, expected an integer from 1 to 1000"),
        ({"concurrency": 1001}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"options": {"temperature": 1}}, r"options\.temperature"),
        ({"options": {"n": 1}}, r"options\.n"),
        ({"options": {"stream": True}}, r"options\.stream"),
        ({"api_key": "sk-\u00e9"}, "api_key_env"),
        ({"api_key": "sk-1\nsk-2"}, "api_key_env"),
    ],
    ids=str,
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"engine\.{message}") as caught:
        OpenAIEngine("m", **{"base_url": "http://host/v1"} | settings)
    assert "sk-" not in str(caught.value)


def test_mistaken_addresses_keep_their_passwords() -> None:
    with pytest.raises(ValueError, match="got 'host/v1'") as caught:
        OpenAIEngine("m", base_url="me:secret@host/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("package", ["openai", "tenacity"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package} .*'fastpo\[openai\]'"):
        OpenAIEngine("m", base_url="http://host/v1")
