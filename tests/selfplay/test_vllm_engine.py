"""The vLLM engine against a stand-in for the module vllm: what it is asked, and what becomes of its answers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastpo.demo.model import build_model, build_tokenizer
from fastpo.selfplay.engines import (
    Completion,
    EngineError,
    EngineSettings,
    Refused,
    Request,
    RequestBatch,
    Sampling,
    make_engine,
)
from fastpo.selfplay.engines import vllm_engine as module
from fastpo.selfplay.engines.transformers_engine import TransformersEngine
from fastpo.selfplay.engines.vllm_engine import VLLMEngine

CONTEXT = 64  # tokens of the stand-in's model


@dataclass
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    stop: list[str]
    seed: int


@dataclass
class LLM:
    """Answers with the number of the prompt's tokens and the seed."""

    arguments: dict[str, Any]
    lost: int = 0  # completions that it fails to give
    calls: list[tuple[list[dict[str, Any]], list[SamplingParams], dict[str, Any]]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=CONTEXT))

    def generate(self, prompts: list[Any], sampling: list[Any], **options: Any) -> list[Any]:
        assert len(prompts) == len(sampling)
        self.calls.append((prompts, sampling, options))
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        text=f"{len(prompt['prompt_token_ids'])}/{params.seed + k}",
                        finish_reason="length" if k else "stop",
                        token_ids=tuple(range(3 + k)),
                    )
                    for k in range(params.n - self.lost)
                ]
            )
            for prompt, params in zip(prompts, sampling, strict=True)
        ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    build_model(tokenizer, hidden_size=16, layers=1).save_pretrained(path)
    return path


@pytest.fixture
def llms(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """What the stand-in has loaded."""
    loaded: list[LLM] = []

    def load(**arguments: Any) -> LLM:
        if arguments.get("tensor_parallel_size") == 2:
            raise RuntimeError("Engine core initialization failed")
        loaded.append(LLM(arguments))
        return loaded[-1]

    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = load, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return loaded


def single(*requests: Request) -> list[RequestBatch]:
    return [RequestBatch([request], 0) for request in requests]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def test_what_vllm_is_asked(checkpoint: Path, llms: list[LLM]) -> None:
    engine = VLLMEngine(
        str(checkpoint),
        options={"gpu_memory_utilization": 0.5},
        dtype="bfloat16",
        trust_remote_code=True,
    )
    sampling = Sampling(
        n=2,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.1,
        max_tokens=9,
        stop=("\n",),
    )
    requests = [Request(4, "Once", 2**62 + 11), Request(9, CHAT, 5)]
    results = dict(engine.generate(single(*requests), sampling, Counter()))

    [llm] = llms
    assert llm.arguments == {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "trust_remote_code": True,
        "gpu_memory_utilization": 0.5,
    }
    [(prompts, drawn, options)] = llm.calls
    assert options == {"use_tqdm": False}
    common: dict[str, Any] = {
        "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1,
        "max_tokens": 9, "stop": ["\n"],
    }  # fmt: skip
    assert drawn == [SamplingParams(seed=11, **common), SamplingParams(seed=5, **common)]
    tokenizer = build_tokenizer()
    expected = [
        tokenizer("Once")["input_ids"],
        tokenizer("<bos><system>Be brief.<user>Why?<assistant>")["input_ids"],
    ]
    # the demo's tokenizer reads the role tokens in a text as its template writes them
    assert [prompt["prompt_token_ids"] for prompt in prompts] == expected
    assert results[4] == [Completion("4/11", "stop", 3), Completion("4/12", "length", 4)]
    assert results[9] == [
        Completion(f"{len(expected[1])}/5", "stop", 3),
        Completion(f"{len(expected[1])}/6", "length", 4),
    ]


def test_prompts_are_those_of_the_transformers_engine(
    checkpoint: Path, llms: list[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    asked: list[list[int]] = []

    def complete(
        self: TransformersEngine, prompts: list[list[int]], seed: int, sampling: Sampling
    ) -> list[Completion]:
        asked.extend(prompts)
        return [Completion("", "stop", 0)] * len(prompts)

    monkeypatch.setattr(TransformersEngine, "_complete", complete)
    requests = single(Request(0, "A text", 1), Request(1, CHAT, 1))
    for kind in ("vllm", "transformers"):
        settings = EngineSettings(kind=kind, chat_template=template)
        engine = make_engine(settings, str(checkpoint))
        list(engine.generate(requests, Sampling(max_tokens=8), Counter()))
    [(prompts, _, _)] = llms[0].calls
    assert [prompt["prompt_token_ids"] for prompt in prompts] == asked
    assert len(asked) == 2


def test_off_is_off(checkpoint: Path, llms: list[LLM]) -> None:
    engine = VLLMEngine(str(checkpoint))
    list(
        engine.generate(
            single(Request(0, "x", 1)), Sampling(temperature=0, max_tokens=8), Counter()
        )
    )
    [(_, [drawn], _)] = llms[0].calls
    assert drawn == SamplingParams(1, 0, 1.0, -1, 1.0, 8, [], 1)
    assert llms[0].arguments["dtype"] == "auto"


def test_chunks_are_read_as_they_are_needed(
    checkpoint: Path, llms: list[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    read: list[int] = []

    def batches() -> Iterator[RequestBatch]:
        for k in range(10):
            read.append(k)
            yield RequestBatch([Request(k, f"prompt {k}", k)], 0)

    engine = VLLMEngine(str(checkpoint))
    results = engine.generate(batches(), Sampling(max_tokens=8), Counter())
    assert not read
    assert not llms  # nor is anything loaded before
    assert next(results)[0] == 0
    assert read == [0, 1, 2, 3]
    assert [number for number, _ in results] == list(range(1, 10))
    assert [len(prompts) for prompts, _, _ in llms[0].calls] == [4, 4, 2]
    assert len(llms) == 1


@pytest.mark.parametrize(
    ("limit", "lengths", "refused"),
    [(None, [55, 56, 57], [57]), (10, [9, 10, 11], [11]), (100, [62, 63, 64], [64])],
)
def test_long_prompts_are_refused(
    checkpoint: Path, llms: list[LLM], limit: int | None, lengths: list[int], refused: list[int]
) -> None:
    """Without a limit the context of 64 leaves 56 beside 8 tokens; with one, vLLM's own still holds."""
    engine = VLLMEngine(str(checkpoint), max_prompt_tokens=limit)
    requests = [Request(length, "x" * length, 1) for length in lengths]
    results = dict(engine.generate(single(*requests), Sampling(max_tokens=8), Counter()))
    assert sorted(results) == lengths
    assert [k for k, r in results.items() if r == Refused("prompt_too_long")] == refused
    [(prompts, _, _)] = llms[0].calls
    assert sorted(len(p["prompt_token_ids"]) for p in prompts) == sorted({*lengths} - {*refused})


def test_nothing_to_complete_asks_for_nothing(checkpoint: Path, llms: list[LLM]) -> None:
    engine = VLLMEngine(str(checkpoint), max_prompt_tokens=3)
    results = list(
        engine.generate(single(Request(7, "too long", 1)), Sampling(max_tokens=8), Counter())
    )
    assert results == [(7, Refused("prompt_too_long"))]
    assert not llms[0].calls
    assert list(VLLMEngine(str(checkpoint)).generate([], Sampling(), Counter())) == []
    assert len(llms) == 1


def test_identity(checkpoint: Path, llms: list[LLM]) -> None:
    options = {"max_model_len": 64}
    found = VLLMEngine(str(checkpoint), options=options).identity()
    same = TransformersEngine(str(checkpoint), options=options).identity()
    same.pop("batch_size")
    assert found == {**same, "kind": "vllm"}
    assert not llms
    other = VLLMEngine(str(checkpoint), options=options, chat_template="{{ 1 }}").identity()
    assert {k for k in found if found[k] != other[k]} == {"chat_template_sha256"}


def test_closed_engines_load_again(checkpoint: Path, llms: list[LLM]) -> None:
    engine = VLLMEngine(str(checkpoint))
    for expected in (1, 2):
        list(engine.generate(single(Request(0, "x", 1)), Sampling(max_tokens=8), Counter()))
        assert len(llms) == expected
        engine.close()
        assert engine._llm is None


def test_errors(checkpoint: Path, llms: list[LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-dir"):
        VLLMEngine("./no-such-dir")
    engine = VLLMEngine(str(checkpoint), options={"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match=r"could not load .*: Engine core initialization failed"):
        list(engine.generate(single(Request(0, "x", 1)), Sampling(max_tokens=8), Counter()))

    engine = VLLMEngine(str(checkpoint))
    engine.llm.lost = 1
    with pytest.raises(EngineError, match="gave 1 completions of row 3, expected 2"):
        list(engine.generate(single(Request(3, "x", 1)), Sampling(n=2, max_tokens=8), Counter()))

    engine = VLLMEngine(str(checkpoint))
    engine.tokenizer.chat_template = None
    with pytest.raises(EngineError, match=r"engine\.chat_template: the prompt of row 8"):
        list(engine.generate(single(Request(8, CHAT, 1)), Sampling(max_tokens=8), Counter()))

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"needs the package vllm.*pip install vllm"):
        VLLMEngine(str(checkpoint))
