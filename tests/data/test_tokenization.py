"""Rows → ids: against texts written out by hand and encoded whole, and against TRL's reading of a row."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fastpo.data import DataReport, load_preferences, tokenize_preferences

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Ids = list[int]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def reference_texts(template: str, turns: list[dict[str, str]], answer: str) -> tuple[str, str]:
    """(prompt, answer up to and with EOS) as the four families write them."""
    prompt = ""
    for turn in turns:
        role, text = turn["role"], turn["content"]
        prompt += {
            "chatml": f"<|im_start|>{role}\n{text}<|im_end|>\n",
            "llama3": f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
            "zephyr": f"<|{role}|>\n{text}</s>\n",
            "gemma": f"<start_of_turn>{'user' if role == 'user' else 'model'}\n{text}<end_of_turn>\n",
        }[template]
    return {
        "chatml": (f"{prompt}<|im_start|>assistant\n", f"{answer}<|im_end|>"),
        "llama3": (
            f"<|begin_of_text|>{prompt}<|start_header_id|>assistant<|end_header_id|>\n\n",
            f"{answer}<|eot_id|>",
        ),
        "zephyr": (f"{prompt}<|assistant|>\n", f"{answer}</s>"),
        "gemma": (f"<s>{prompt}<start_of_turn>model\n", f"{answer}<end_of_turn>\n</s>"),
    }[template]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Ids:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def tokenize(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[dict[str, Any]], DataReport]:
    out, report = tokenize_preferences(
        datasets.Dataset.from_list(rows), tokenizer, max_length=10_000
    )
    return out.to_list(), report


def one(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[Ids, Ids, Ids]:
    (result,), _ = tokenize([row], tokenizer)
    return result["prompt_ids"], result["chosen_ids"], result["rejected_ids"]


def random_text(rng: random.Random) -> str:
    words = [
        "sky",
        "blue",
        "the",
        "The",
        " ",
        "\n\n",
        "2+3=5",
        "é",
        "天空",
        "🙂",
        "x.",
        "<b>",
        "it's",
        "  two",
    ]
    text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 12))).strip()
    return text or "it"


# --- formats and templates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["explicit", "implicit", "ultrafeedback", "prompt text", "repeated", "parts", "nulls"]
)
@pytest.mark.parametrize("template", ["chatml", "llama3", "zephyr", "gemma"])
def test_conversations(template: str, form: str, make_tokenizer: MakeTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = make_tokenizer(template, add_bos=template in ("zephyr", "llama3", "gemma"))
    rows, expected = [], []
    for k in range(20):
        turns = [user(random_text(rng))]
        if form in ("explicit", "implicit", "repeated") and k % 2:
            turns += [assistant(random_text(rng)), user(random_text(rng))]
        good, bad = f"{random_text(rng)} good", f"{random_text(rng)} bad"
        answers = {"chosen": [assistant(good)], "rejected": [assistant(bad)]}
        whole = {name: turns + answer for name, answer in answers.items()}
        parts = {
            name: [
                {"role": "assistant", "content": [{"type": "text", "text": answer[0]["content"]}]}
            ]
            for name, answer in answers.items()
        }
        nulls = {
            name: [{**m, "tool_calls": None} for m in answer] for name, answer in answers.items()
        }
        extra = {"score_chosen": 7.5, "messages": whole["chosen"], "prompt_id": f"{k:x}"}
        rows.append(
            {
                "explicit": {"prompt": turns, **answers},
                "implicit": {**whole},
                "ultrafeedback": {"prompt": turns[0]["content"], **whole, **extra},
                "prompt text": {"prompt": turns[0]["content"], **answers},
                "repeated": {"prompt": turns, **whole},
                "parts": {"prompt": turns, **parts},
                "nulls": {"prompt": turns, **nulls},
            }[form]
        )
        prompt, chosen = reference_texts(template, turns, good)
        _, rejected = reference_texts(template, turns, bad)
        expected.append((prompt, chosen, rejected))
    results, report = tokenize(rows, tokenizer)
    assert [r["row"] for r in results] == list(range(20))
    assert not report.dropped
    assert not report.noted
    for result, (prompt, chosen, rejected) in zip(results, expected, strict=True):
        assert result["prompt_ids"] == encode(tokenizer, prompt)
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            ids = result["prompt_ids"] + result[f"{side}_ids"]
            assert ids == encode(tokenizer, prompt + answer)
            assert tokenizer.decode(ids) == prompt + answer
            assert result[f"{side}_ids"].count(tokenizer.eos_token_id) == 1
            assert result[f"{side}_ids"][-1] == tokenizer.eos_token_id
            if tokenizer.bos_token_id is not None:
                assert ids.count(tokenizer.bos_token_id) == (
                    template != "zephyr"
                )  # as the template says


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("ends", ["", "</s>", "</s></s>", "</s>\n"])
def test_plain_text(kind: str, add_bos: bool, ends: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(kind=kind, add_bos=add_bos)
    row = {
        "prompt": "What color is the sky?",
        "chosen": f" The sky is blue{ends}",
        "rejected": f" it is{ends}",
    }
    prompt, chosen, rejected = one(row, tokenizer)
    assert prompt == add_bos * [tokenizer.bos_token_id] + encode(
        tokenizer, "What color is the sky?"
    )
    for answer, text in ((chosen, " The sky is blue"), (rejected, " it is")):
        assert answer[-1] == tokenizer.eos_token_id
        whole = add_bos * [tokenizer.bos_token_id] + encode(tokenizer, row["prompt"] + text)
        assert prompt + answer[:-1] == whole


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_never_doubled(kind: str, add_bos: bool, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(kind=kind, add_bos=add_bos)
    row = {"prompt": "<s>The sky is", "chosen": "<s> blue", "rejected": " black"}
    prompt, chosen, rejected = one(row, tokenizer)
    for answer in (chosen, rejected):
        assert (prompt + answer).count(tokenizer.bos_token_id) == 1
        assert prompt[0] == tokenizer.bos_token_id
    implicit = {"chosen": "<s>The sky is blue", "rejected": "<s>The sky is green"}
    prompt, chosen, rejected = one(implicit, tokenizer)
    assert (prompt + chosen).count(tokenizer.bos_token_id) == 1


def test_tokenizer_that_also_adds_eos(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", eos)]
    )
    assert tokenizer("a")["input_ids"][-1] == eos
    prompt, chosen, _ = one({"prompt": "The sky", "chosen": " is", "rejected": " no"}, tokenizer)
    assert prompt == [tokenizer.bos_token_id, *encode(tokenizer, "The sky")]
    assert chosen == [*encode(tokenizer, " is"), eos]


@pytest.mark.parametrize("add_bos", [False, True])
def test_implicit_plain_prompt_is_the_common_tokens(
    add_bos: bool, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    texts = [
        f"\n\nHuman: Is it?\n\nAssistant: The sky is bl{end}" for end in ("ue and wide.", "ack!")
    ]
    prompt, chosen, rejected = one(dict(zip(("chosen", "rejected"), texts, strict=True)), tokenizer)
    bos = add_bos * [tokenizer.bos_token_id]
    for answer, text in ((chosen, texts[0]), (rejected, texts[1])):
        assert prompt + answer == bos + encode(tokenizer, text) + [tokenizer.eos_token_id]
    assert chosen[0] != rejected[0]
    # " blue" and " black" are words of the training text: no word is cut where the letters part
    assert tokenizer.decode(prompt[add_bos:]).endswith("The sky is")


def test_tools_reach_the_template(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% if brief %}Be brief. {% endif %}"
        + tokenizer.chat_template.replace(
            "m['content']", "(m['tool_calls'] | default([]) | tojson) + m['content']"
        )
    )
    tools = [{"name": "add", "parameters": {"a": "int"}}, {"name": "now", "parameters": {}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    row = {
        "prompt": [user("2 + 3 =")],
        "chosen": [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "5"},
            assistant("5"),
        ],
        "rejected": [assistant("6")],
    }
    path = tmp_path / "prefs.jsonl"
    rows = [
        {**row, "tools": tools},
        {**row, "tools": []},
        {**row, "chat_template_kwargs": {"brief": True}},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    keys = (*row, "tools", "chat_template_kwargs")
    table = [
        {key: r.get(key) for key in keys} | {"tools": json.dumps(r.get("tools"))} for r in rows
    ]
    for dataset in (load_preferences(path), datasets.Dataset.from_list(table)):
        results, _ = tokenize_preferences(dataset, tokenizer, max_length=10_000)
        texts = [tokenizer.decode(r["prompt_ids"] + r["chosen_ids"]) for r in results]
        head = '{"name": "add", "parameters": {"a": "int"}}\n{"name": "now", "parameters": {}}\n'
        body = (
            "<|im_start|>user\n[]2 + 3 =<|im_end|>\n"
            f"<|im_start|>assistant\n[{json.dumps(call)}]<|im_end|>\n"
            "<|im_start|>tool\n[]5<|im_end|>\n<|im_start|>assistant\n[]5<|im_end|>"
        )
        assert texts == [head + body, body, "Be brief. " + body]


@pytest.mark.parametrize("template", ["chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("implicit", [False, True])
def test_same_texts_as_trl(template: str, implicit: bool, make_tokenizer: MakeTokenizer) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = make_tokenizer(template)
    turns = [user("What color is the sky?"), assistant("It is"), user("Is it?")]
    row = {"chosen": turns + [assistant("blue.")], "rejected": turns + [assistant("green")]}
    explicit = data_utils.extract_prompt(row)
    theirs = data_utils.apply_chat_template(explicit, tokenizer)
    ours = one(row if implicit else explicit, tokenizer)
    for name, ids in zip(("prompt", "chosen", "rejected"), ours, strict=True):
        text = theirs[name] if name == "prompt" else theirs[name].rstrip()  # ours ends with EOS
        assert ids == encode(tokenizer, text)


@pytest.mark.parametrize(
    "name",
    [
        "llama3_1",
        "qwen2_5",
        "qwen3",
        "gemma",
        "gemma3",
        "phi3",
        "deepseekv3",
        "gptoss",
        "glm4moe",
        "cohere",
        "lfm2",
    ],
)
def test_templates_in_the_wild(name: str, make_tokenizer: MakeTokenizer) -> None:
    spec = importlib.util.find_spec("trl")
    path = (
        Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja")
        if spec
        else None
    )
    if path is None or not path.is_file():
        pytest.skip("this TRL has no such template")
    tokenizer = make_tokenizer("gemma", add_bos=True)
    tokenizer.chat_template = path.read_text()
    row = {
        "prompt": "Is it?",
        "chosen": [user("Is it?"), assistant("It is.")],
        "rejected": [user("Is it?"), assistant("No")],
    }
    (result,), report = tokenize([row], tokenizer)
    prompt, chosen, rejected = (
        tokenizer.decode(result[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected")
    )
    assert "Is it?" in prompt
    assert "It is." in chosen
    assert "No" in rejected
    assert "It is." not in prompt
    assert (prompt + chosen).count("<s>") <= 1
    assert chosen.count("</s>") == 1
    assert chosen.endswith("</s>")
    whole = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
    assert (prompt + chosen).removesuffix("</s>") == whole.removesuffix("</s>")
    assert set(report.noted) == ({"generation_prompt_differs"} if name == "deepseekv3" else set())


def test_turns_after_an_explicit_prompt_are_the_answer(make_tokenizer: MakeTokenizer) -> None:
    """Also those that both answers share; only what precedes the assistant's turn joins the prompt."""
    tokenizer = make_tokenizer("chatml")
    turns = [user("Is it?"), assistant("I think"), user("And?")]
    ends = {"chosen": [assistant("It is.")], "rejected": [assistant("No")]}
    rows = [
        {"prompt": turns[:1], **{side: turns[1:] + end for side, end in ends.items()}},
        {"prompt": turns[:2], **{side: turns[2:] + end for side, end in ends.items()}},
    ]
    results, _ = tokenize(rows, tokenizer)
    prompt, _ = reference_texts("chatml", turns[:1], "")
    long_prompt, answer = reference_texts("chatml", turns, "It is.")
    assert tokenizer.decode(results[0]["prompt_ids"]) == prompt
    assert (
        tokenizer.decode(results[0]["prompt_ids"] + results[0]["chosen_ids"])
        == long_prompt + answer
    )
    assert tokenizer.decode(results[1]["prompt_ids"]) == long_prompt
    assert tokenizer.decode(results[1]["chosen_ids"]) == answer


def test_fields_that_arrow_invents_never_reach_the_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "(m | tojson)")
    calls = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "now", "arguments": arguments}],
        }
        for arguments in ({"a": 1}, {"b": "x"})
    ]
    rows = [
        {"prompt": [user("Is it?")], "chosen": [answer], "rejected": [assistant("No")]}
        for answer in (*calls, assistant("It is."))
    ]
    dataset = datasets.Dataset.from_list(rows)
    assert dataset[0]["chosen"][0]["tool_calls"][0]["arguments"] == {"a": 1, "b": None}
    assert dataset[2]["chosen"][0]["tool_calls"] is None
    results, _ = tokenize(rows, tokenizer)
    for row, result in zip(rows, results, strict=True):
        text = tokenizer.decode(result["chosen_ids"])
        assert json.loads(text.removesuffix("<|im_end|>")) == row["chosen"][0]


# --- where prompt and answer meet ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_token_that_would_join_prompt_and_answer(
    kind: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(kind=kind, add_bos=True)
    row = {"prompt": "The sky is ", "chosen": "blue", "rejected": "\n\nblack"}
    whole = encode(tokenizer, "The sky is blue")
    alone = encode(tokenizer, "The sky is ")
    assert whole[: len(alone)] != alone  # else this tests nothing
    (result,), report = tokenize([row], tokenizer)
    assert result["prompt_ids"] == [tokenizer.bos_token_id, *alone]  # what generation would see
    for side, answer in (("chosen", "blue"), ("rejected", "\n\nblack")):
        text = tokenizer.decode(result["prompt_ids"][1:] + result[f"{side}_ids"])
        assert text == f"The sky is {answer}</s>"
    assert report.noted["split_tokens"].count == 1
    assert report.noted["split_tokens"].first_rows == [0]
    _, report = tokenize(
        [{"prompt": "The sky is", "chosen": " blue", "rejected": " black"}], tokenizer
    )
    assert "split_tokens" not in report.noted


def test_template_whose_generation_prompt_differs(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    plain = tokenizer.chat_template
    tokenizer.chat_template = plain.replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    assert tokenizer.chat_template != plain
    # the answers begin alike: what they share stays theirs
    row = {
        "prompt": [user("Is it?")],
        "chosen": [assistant("It is.")],
        "rejected": [assistant("It was")],
    }
    (result,), report = tokenize([row], tokenizer)
    prompt, chosen = reference_texts("chatml", row["prompt"], "It is.")
    _, rejected = reference_texts("chatml", row["prompt"], "It was")
    assert result["prompt_ids"] == encode(tokenizer, prompt)
    assert result["chosen_ids"] == encode(tokenizer, chosen)
    assert result["rejected_ids"] == encode(tokenizer, rejected)
    assert report.noted["generation_prompt_differs"].first_rows == [0]


def test_template_that_rewrites_the_prompt_drops_the_row(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }} messages: " + tokenizer.chat_template
    row = {
        "prompt": [user("Is it?")],
        "chosen": [assistant("It is.")],
        "rejected": [assistant("No")],
    }
    with pytest.raises(ValueError, match=r"changes the prompt once an answer follows \(row 0\)"):
        tokenize([row], tokenizer)
