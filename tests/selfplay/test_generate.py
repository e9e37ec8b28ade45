"""``fastpo generate`` on the transformers engine: against generate itself, by batch and seed, and mistakes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from selfplay_files import read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastpo.cli import main
from fastpo.selfplay.engines import (
    EngineError,
    EngineSettings,
    Request,
    RequestBatch,
    Sampling,
    make_engine,
)
from fastpo.selfplay.engines.transformers_engine import TransformersEngine
from fastpo.selfplay.generate import GenerateConfig, generate
from fastpo.selfplay.manifest import load_manifest
from fastpo.selfplay.settings import from_mapping

PROMPTS = ["ab", "a longer prompt than the others", "xyz 12", "q", "hello there"]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def complete(engine: Any, prompts: list[Any], sampling: Sampling, seed: int = 3) -> list[Any]:
    batch = RequestBatch([Request(k, p, 100 + k) for k, p in enumerate(prompts)], seed)
    found = dict(engine.generate(iter([batch]), sampling, Counter()))
    return [found[k] for k in range(len(prompts))]


def test_greedy_completions_are_those_of_the_model_one_by_one(checkpoint: Path) -> None:
    """Whatever the padding: a prompt alone and among longer ones."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    engine = TransformersEngine(str(checkpoint), dtype="float32", device="cpu")
    made = complete(engine, [chat(p) for p in PROMPTS], Sampling(temperature=0, max_tokens=9))
    for prompt, (completion,) in zip(PROMPTS, made, strict=True):
        ids = tokenizer.apply_chat_template(
            chat(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        out = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist()
        if tokenizer.eos_token_id in out:
            out = out[: out.index(tokenizer.eos_token_id)]
            assert completion.finish_reason == "stop"
            assert completion.tokens == len(out) + 1
        else:
            assert completion.finish_reason == "length"
            assert completion.tokens == 9
        assert completion.text == tokenizer.decode(out, skip_special_tokens=True)


def test_a_batch_depends_on_its_seed_alone(checkpoint: Path) -> None:
    sampling = Sampling(n=3, max_tokens=8)
    engine = TransformersEngine(str(checkpoint), device="cpu")
    first = complete(engine, PROMPTS, sampling)
    torch.manual_seed(1)
    complete(engine, ["something else"], sampling)
    state = torch.get_rng_state()
    again = complete(engine, PROMPTS, sampling)
    assert torch.equal(torch.get_rng_state(), state)
    assert again == first
    assert complete(engine, PROMPTS, sampling, seed=4) != first
    assert [len(completions) for completions in first] == [3] * len(PROMPTS)
    assert len({c.text for c in first[0]}) > 1


def test_the_checkpoints_own_generation_settings_do_not_leak_in(
    checkpoint: Path, tmp_path: Path
) -> None:
    """But the tokens that end a text do."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    letter = tokenizer("e").input_ids[0]
    model.generation_config = GenerationConfig(top_k=1, do_sample=True, eos_token_id=[2, letter])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sampling = Sampling(n=20, max_tokens=12)
    plain = complete(TransformersEngine(str(checkpoint), device="cpu"), ["ab"], sampling)[0]
    other = complete(TransformersEngine(str(tmp_path), device="cpu"), ["ab"], sampling)[0]
    assert len({c.text for c in other}) > 10  # top_k 1 would make them all alike
    assert not any("e" in c.text for c in other)
    assert any("e" in c.text for c in plain)
    assert any(c.finish_reason == "stop" and c.text for c in other)


def test_stop_texts_end_a_completion_before_them(checkpoint: Path) -> None:
    engine = TransformersEngine(str(checkpoint), device="cpu")
    free = complete(engine, ["ab"] * 6, Sampling(max_tokens=20), seed=1)
    stop = free[0][0].text[3]
    made = complete(engine, ["ab"] * 6, Sampling(max_tokens=20, stop=(stop,)), seed=1)
    assert made[0][0].text == free[0][0].text[:3]
    assert made[0][0].finish_reason == "stop"
    assert made[0][0].tokens == 4
    assert not any(stop in completions[0].text for completions in made)


def test_too_long_prompts_are_refused_the_others_served(checkpoint: Path) -> None:
    engine = TransformersEngine(str(checkpoint), device="cpu", max_prompt_tokens=10)
    made = complete(engine, ["a" * 11, "a" * 10], Sampling(max_tokens=2))
    assert made[0].reason == "prompt_too_long"
    assert len(made[1]) == 1
    engine = TransformersEngine(str(checkpoint), device="cpu")  # 512 positions
    made = complete(engine, ["a" * 505, "a" * 400], Sampling(max_tokens=20))
    assert made[0].reason == "prompt_too_long"


def test_a_conversation_needs_a_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "m")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "m")
    engine = TransformersEngine(str(tmp_path / "m"), device="cpu")
    with pytest.raises(EngineError, match=r"engine\.chat_template: the prompt of row 0"):
        complete(engine, [chat("a")], Sampling(max_tokens=2))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}=")
    with_file = TransformersEngine(str(tmp_path / "m"), device="cpu", chat_template=str(template))
    greedy = Sampling(max_tokens=5, temperature=0)
    assert complete(with_file, [chat("ab")], greedy) == complete(engine, ["ab="], greedy)
    assert with_file.identity()["chat_template_sha256"] != engine.identity()["chat_template_sha256"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": p, "id": k} for k, p in enumerate(PROMPTS * 3)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def config(prompts: Path, checkpoint: Path, output: str, **changes: Any) -> GenerateConfig:
    values: dict[str, Any] = {
        "prompts": str(prompts), "output": str(prompts.with_name(output)), "model": str(checkpoint),
        "engine": {"batch_size": 4, "device": "cpu"}, "sampling": {"max_tokens": 6, "n": 2},
    }  # fmt: skip
    return GenerateConfig(**(values | changes))


def test_a_file_of_prompts(prompts: Path, checkpoint: Path) -> None:
    manifest = generate(config(prompts, checkpoint, "out.jsonl"))
    rows = read_jsonl(prompts.with_name("out.jsonl"))
    assert [row["id"] for row in rows] == list(range(15))
    assert all(len(row["responses"]) == len(row["finish_reasons"]) == 2 for row in rows)
    assert rows[0]["prompt"] == chat("ab")  # the model has a chat template
    assert manifest.identity["settings"]["sampling"]["max_tokens"] == 6
    assert len(manifest.identity["settings"]["engine"]["model"]["sha256"]) == 64
    generate(config(prompts, checkpoint, "plain.jsonl", chat=False))
    assert read_jsonl(prompts.with_name("plain.jsonl"))[0]["prompt"] == "ab"
    generate(config(prompts, checkpoint, "system.jsonl", system_prompt="be kind"))
    first = read_jsonl(prompts.with_name("system.jsonl"))[0]["prompt"]
    assert first == [{"role": "system", "content": "be kind"}, *chat("ab")]


def test_stopped_and_continued_it_is_the_same_file(
    prompts: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(config(prompts, checkpoint, "whole.jsonl"))
    real, calls = TransformersEngine._complete, []

    def dies(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "_complete", dies)
        with pytest.raises(KeyboardInterrupt):
            generate(config(prompts, checkpoint, "out.jsonl"))
    calls.clear()
    monkeypatch.setattr(
        TransformersEngine, "_complete", lambda s, *a: (calls.append(1), real(s, *a))[1]
    )
    generate(config(prompts, checkpoint, "out.jsonl"))
    assert len(calls) == 2  # of four batches
    files = [prompts.with_name(name).read_bytes() for name in ("whole.jsonl", "out.jsonl")]
    assert files[0] == files[1]
    calls.clear()
    generate(config(prompts, checkpoint, "out.jsonl"))
    assert not calls


def test_another_model_or_template_is_another_stage(
    prompts: Path, checkpoint: Path, tmp_path: Path
) -> None:
    generate(config(prompts, checkpoint, "out.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the content of engine\.model changed"):
        generate(config(prompts, tmp_path / "other", "out.jsonl"))


def test_the_command(prompts: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prompts.with_name("out.jsonl")
    arguments = [
        "generate", "--prompts", str(prompts), "--output", str(out), "--model", str(checkpoint),
        "--sampling.max_tokens", "3", "--sampling.temperature", "1e-1", "--engine.device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "out.jsonl: 15 rows of 15" in capsys.readouterr().out
    assert load_manifest(out).identity["settings"]["sampling"]["temperature"] == 0.1
    assert main([*arguments, "--seed", "4"]) == 2
    assert "settings.seed: 0 → 4" in capsys.readouterr().err
    unset = [*arguments, "--engine.batch_size", "null"]  # the default, so the same stage
    assert main(unset) == 0
    assert main(arguments[:5]) == 2
    assert "engine.model: got None" in capsys.readouterr().err
    assert main(["generate", "--output", "x.jsonl"]) == 2
    assert "prompts: expected a value, in the file or as --prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": {"temperature": -1}}, r"sampling\.temperature: got -1"),
        ({"sampling": {"top_p": 0}}, r"sampling\.top_p: got 0"),
        ({"sampling": {"n": 2, "temperature": 0}}, r"sampling\.n: got 2 with temperature 0"),
        ({"sampling": {"temprature": 1}}, r"unknown field 'temprature', did you mean 'temperature'"),
        ({"sampling": {"max_tokens": "many"}}, r"sampling\.max_tokens: got 'many', expected int"),
        ({"engine": {"kind": "gpt"}}, r"engine\.kind: got 'gpt', expected one of transformers, vllm, openai"),
        ({"engine": {"concurrency": 3}}, r"engine\.concurrency: has no effect with engine\.kind 'trans"),
        ({"engine": {"kind": "vllm", "batch_size": 8}}, r"engine\.batch_size: .* 'vllm'; unset it \(null"),
        ({"engine": {"options": {"hf_token": "s"}}}, r"engine\.options\.hf_token: .* variable HF_TOKEN"),
        ({"engine": {"kind": "openai", "options": {"api_key": "s"}}}, r"variable OPENAI_API_KEY"),
        ({"engine": {"batch_size": 0}}, r"engine\.batch_size: got 0"),
        ({"engine": "fast"}, r"engine: got 'fast', expected a mapping"),
        ({"model": "/no/such/model"}, r"model: /no/such/model is not a directory"),
        ({"model": None}, r"engine\.model: got None"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    change: dict[str, Any], message: str, prompts: Path, checkpoint: Path
) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        generate(config(prompts, checkpoint, "out.jsonl", **change))
    assert not list(prompts.parent.glob("out.jsonl*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope.jsonl", r"^prompts: no file 'nope\.jsonl'"),
        ("nope.csv", r"^prompts: nope\.csv: expected a file that ends in"),
    ],
)
def test_a_prompts_file_that_cannot_be_names_its_field(
    name: str, message: str, checkpoint: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(config(Path(name), checkpoint, "out.jsonl"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"line 2: no 'prompt' \(the row has 'text'\)"),
        ({"prompt": " "}, "line 2: the prompt is empty"),
        ({"prompt": 3}, "line 2: prompt must be a string or a list of messages, got int"),
        ({"messages": []}, "line 2: the prompt is empty"),
    ],
)
def test_a_row_without_a_prompt_is_named(
    row: dict[str, Any], message: str, tmp_path: Path, checkpoint: Path
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(ValueError, match=message):
        generate(config(path, checkpoint, "out.jsonl"))


def test_messages_lose_their_answer(tmp_path: Path, checkpoint: Path) -> None:
    messages = [*chat("a"), {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": messages}])
    generate(config(path, checkpoint, "out.jsonl"))
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["prompt"] == chat("a")
    assert row["messages"] == messages


def test_settings_take_numbers_as_yaml_has_them() -> None:
    settings = from_mapping(
        EngineSettings, {"kind": "openai", "timeout": "1e1", "model": "m"}, "engine"
    )
    assert settings.timeout == 10.0
    unset = from_mapping(
        EngineSettings, {"kind": "vllm", "batch_size": None, "dtype": None}, "engine"
    )
    assert (unset.batch_size, unset.dtype) == (16, "auto")
    with pytest.raises(TypeError, match=r"engine\.trust_remote_code: got 1, expected bool"):
        from_mapping(EngineSettings, {"trust_remote_code": 1}, "engine")
    with pytest.raises(ValueError, match=r"engine\.model: got None"):
        make_engine(EngineSettings())
    assert (
        json.dumps(from_mapping(EngineSettings, {"options": {"a": 1}}, "engine").options)
        == '{"a": 1}'
    )
