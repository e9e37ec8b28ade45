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
from fastpo.data.report import DROPPED, NOTED

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
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> tuple[list[dict[str, Any]], DataReport]:
    options.setdefault("max_length", 10_000)
    out, report = tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer, **options)
    assert out.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]
    assert report.rows == len(rows)
    assert report.kept == len(out) == len(rows) - sum(f.count for f in report.dropped.values())
    return out.to_list(), report


def one(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> tuple[Ids, Ids, Ids]:
    (result,), _ = tokenize([row], tokenizer, **options)
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


# --- lengths ---------------------------------------------------------------------------------------------

LONG = {"prompt": "One Two Three Be brief.", "chosen": " a longer answer", "rejected": " brief"}


@pytest.mark.parametrize("add_bos", [False, True])
def test_max_prompt_length_keeps_the_end(add_bos: bool, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    full, chosen, rejected = one(LONG, tokenizer)
    for limit in range(1, len(full) + 3):
        (result,), report = tokenize([LONG], tokenizer, max_prompt_length=limit)
        if limit >= len(full):
            expected = full
        elif add_bos and limit > 1:
            expected = [tokenizer.bos_token_id] + full[-(limit - 1) :]
        else:
            expected = full[-limit:]
        assert result["prompt_ids"] == expected
        assert (result["chosen_ids"], result["rejected_ids"]) == (chosen, rejected)
        assert ("prompt_shortened" in report.noted) == (limit < len(full))


def test_max_length_drops_what_does_not_fit_and_never_cuts(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    short = {"prompt": "Be", "chosen": " it", "rejected": " is"}
    swapped = {**LONG, "chosen": LONG["rejected"], "rejected": LONG["chosen"]}
    rows = [short, LONG, short, swapped]
    prompt, chosen, rejected = one(LONG, tokenizer)
    need = len(prompt) + max(len(chosen), len(rejected))
    results, report = tokenize(rows, tokenizer, max_length=need)
    assert [r["row"] for r in results] == [0, 1, 2, 3]
    assert (results[1]["prompt_ids"], results[1]["chosen_ids"]) == (prompt, chosen)
    results, report = tokenize(rows, tokenizer, max_length=need - 1)
    assert [r["row"] for r in results] == [0, 2]
    assert report.dropped["too_long"].count == 2
    assert report.dropped["too_long"].first_rows == [1, 3]
    # a shorter prompt makes room
    results, report = tokenize(
        rows, tokenizer, max_length=need - 1, max_prompt_length=len(prompt) - 1
    )
    assert [r["row"] for r in results] == [0, 1, 2, 3]
    assert (results[1]["prompt_ids"], results[1]["chosen_ids"]) == (prompt[1:], chosen)
    assert report.noted["prompt_shortened"].first_rows == [1, 3]
    unbounded, _ = tokenize(rows, tokenizer, max_length=None)
    assert len(unbounded) == 4


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_length": 0}, r"max_length: got 0, expected a number of tokens ≥ 1"),
        ({"max_length": 10.0}, r"max_length: got 10\.0"),
        ({"max_length": True}, r"max_length: got True"),
        ({"max_length": 10, "max_prompt_length": -1}, r"max_prompt_length: got -1"),
        (
            {"max_length": 10, "max_prompt_length": 10},
            r"max_prompt_length: got 10, expected less than max_length",
        ),
    ],
)
def test_bad_lengths(lengths: dict[str, Any], message: str, make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize([LONG], make_tokenizer(), **lengths)


# --- rows without a preference, and the report -----------------------------------------------------------


def test_unusable_rows_are_counted_and_named(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    good = {"prompt": "Is it?", "chosen": " It is.", "rejected": " No"}
    rows = [
        {**good, "rejected": " It is."},
        {**good, "rejected": " It is.</s>"},  # the same once EOS is there
        {**good, "chosen": ""},
        good,
        {**good, "rejected": " \n"},
        {**good, "rejected": "</s>"},
        {"prompt": "", "chosen": "It is.", "rejected": "No"},  # no BOS: nothing precedes the answer
        {**good, "chosen": " It" * 50},
        good,
    ]
    results, report = tokenize(rows, tokenizer, max_length=40, source="prefs.jsonl")
    assert [r["row"] for r in results] == [3, 8]
    assert {key: (f.count, f.first_rows) for key, f in report.dropped.items()} == {
        "equal_answers": (2, [0, 1]),
        "empty_answer": (3, [2, 4, 5]),
        "no_prompt": (1, [6]),
        "too_long": (1, [7]),
    }
    text = str(report)
    assert text.splitlines()[0] == "prefs.jsonl: 9 rows, 2 kept"
    assert "2  chosen equals rejected (rows 0, 1)" in text
    assert "3  an answer is empty (rows 2, 4, 5)" in text
    lengths = [len(r["chosen_ids"]) for r in results]
    counts = report.tokens["chosen"]
    assert (counts.total, counts.min, counts.mean, counts.median, counts.max) == (
        sum(lengths), min(lengths), sum(lengths) / 2, sum(lengths) / 2, max(lengths),
    )  # fmt: skip
    assert json.loads(json.dumps(report.to_dict()))["dropped"]["too_long"] == {
        "count": 1,
        "first_rows": [7],
        "detail": "",
    }


def test_unusable_conversations(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("gemma")
    ask = [user("Is it?")]
    good = {"prompt": ask, "chosen": [assistant("It is.")], "rejected": [assistant("No")]}
    rows = [
        {**good, "rejected": [assistant("It is.")]},
        {**good, "chosen": [assistant(" \n")]},  # Gemma's <end_of_turn> still follows it
        {**good, "chosen": []},
        {
            "prompt": [],
            "chosen": [user("Is it?"), assistant("It is.")],
            "rejected": [user("What?"), assistant("No")],
        },
        {"prompt": [], "chosen": [assistant("It is.")], "rejected": [assistant("No")]},
        good,
        {
            "prompt": [],
            "chosen": ask + [assistant("One")],
            "rejected": ask + [assistant("One"), user("x"), assistant("Two")],
        },
    ]
    results, report = tokenize(rows, tokenizer)
    assert [r["row"] for r in results] == [5, 6]
    assert {key: f.first_rows for key, f in report.dropped.items()} == {
        "equal_answers": [0],
        "empty_answer": [1, 2],
        "no_common_prompt": [3],
        "no_prompt": [4],
    }
    # an answer that continues the other one: both keep the assistant's first turn
    assert tokenizer.decode(results[1]["chosen_ids"]) == "One<end_of_turn>\n</s>"
    assert tokenizer.decode(results[1]["rejected_ids"]).startswith(
        "One<end_of_turn>\n<start_of_turn>user\nx"
    )


def test_a_template_that_refuses_a_row_is_counted(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        + tokenizer.chat_template
    )
    good = {
        "prompt": [user("Is it?")],
        "chosen": [assistant("It is.")],
        "rejected": [assistant("No")],
    }
    system = {**good, "prompt": [{"role": "system", "content": "Be brief."}, user("Is it?")]}
    results, report = tokenize([good, system], tokenizer)
    assert [r["row"] for r in results] == [0]
    assert report.dropped["template_error"].first_rows == [1]
    assert "no system role here" in str(report)
    tokenizer.chat_template = (
        "{{ messages[0]['role'] }}"  # would make the answers equal, but they are not
    )
    with pytest.raises(ValueError, match="it renders chosen and rejected alike"):
        tokenize([good], tokenizer)


def test_answer_of_white_space_alone_is_empty(make_tokenizer: MakeTokenizer) -> None:
    good = {"prompt": None, "chosen": "Is it? It is.", "rejected": "Is it? No"}
    rows = [
        good,
        {**good, "rejected": "Is it?\n \n"},  # implicit prompt
        {**good, "rejected": "Is it?"},
        {"prompt": "Is it?", "chosen": " It is.", "rejected": " \n</s>"},
    ]
    results, report = tokenize(rows, make_tokenizer())
    assert [r["row"] for r in results] == [0]
    assert report.dropped["empty_answer"].first_rows == [1, 2, 3]


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


def test_empty_prompt_with_bos_is_noted(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(add_bos=True)
    (result,), report = tokenize([{"prompt": "", "chosen": "It is.", "rejected": "No"}], tokenizer)
    assert result["prompt_ids"] == [tokenizer.bos_token_id]
    assert report.noted["empty_prompt"].count == 1


def test_nothing_left_is_an_error_with_the_counts(make_tokenizer: MakeTokenizer) -> None:
    rows = [{**LONG, "rejected": LONG["chosen"]}] * 7 + [LONG]
    with pytest.raises(ValueError) as info:  # noqa: PT011
        tokenize(rows, make_tokenizer(), max_length=5, source="prefs.jsonl")
    assert str(info.value).splitlines()[1] == "prefs.jsonl: 8 rows, 0 kept"
    assert "7  chosen equals rejected (rows 0, 1, 2, 3, 4, …)" in str(info.value)
    assert "1  prompt and the longer answer exceed max_length (row 7)" in str(info.value)


def test_bad_arguments(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    chat = {"prompt": [user("x")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(
        ValueError,
        match=r"chat_template: prefs, row 0 \(from 0\) is a conversation.*set `chat_template`",
    ):
        tokenize([chat], tokenizer, source="prefs")
    with pytest.raises(ValueError, match=r"prefs, row 1 \(from 0\): no 'rejected'"):
        tokenize([LONG, {**LONG, "rejected": None}], tokenizer, source="prefs")
    with pytest.raises(
        ValueError,
        match=r"prefs: no column 'rejected', the columns are \['prompt', 'bad', 'chosen'\]",
    ):
        tokenize([{"prompt": "a", "bad": "b", "chosen": "c"}], tokenizer, source="prefs")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([LONG])})
    with pytest.raises(TypeError, match=r"dataset: got DatasetDict, expected a datasets\.Dataset"):
        tokenize_preferences(splits, tokenizer, max_length=100)  # type: ignore[arg-type]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: it has no eos_token"):
        tokenize([LONG], tokenizer)


def test_every_reason_has_a_meaning() -> None:
    source = Path(importlib.util.find_spec("fastpo.data.tokenization").origin).parent
    code = (source / "tokenization.py").read_text() + (source / "formats.py").read_text()
    for reason in {**DROPPED, **NOTED}:
        assert f'"{reason}"' in code


# --- determinism and processes ---------------------------------------------------------------------------


def test_no_stale_cache_and_processes_agree(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [user(f"{k} + 1")],
            "chosen": [assistant(f"{k + 1}")],
            "rejected": [assistant("x")],
        }
        for k in range(40)
    ]
    rows[7]["chosen"] = rows[7]["rejected"]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    dataset = datasets.load_from_disk(str(tmp_path / "saved"))  # memory-mapped: map would cache it
    tokenizer = make_tokenizer("chatml")
    first, report = tokenize_preferences(dataset, tokenizer, max_length=100)
    again, _ = tokenize_preferences(dataset, tokenizer, max_length=100)
    assert again.to_list() == first.to_list()
    assert not list((tmp_path / "saved").glob("cache-*"))
    two, report_two = tokenize_preferences(dataset, tokenizer, max_length=100, num_proc=2)
    assert two.to_list() == first.to_list()
    assert report_two == report
    tokenizer.chat_template = "Be brief. " + tokenizer.chat_template
    other, _ = tokenize_preferences(dataset, tokenizer, max_length=100)
    assert tokenizer.decode(other[0]["prompt_ids"]).startswith("Be brief. <|im_start|>user")
    longest = max(
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in other
    )
    shorter, report = tokenize_preferences(dataset, tokenizer, max_length=longest - 1)
    assert len(shorter) < len(other)
    assert report.dropped["too_long"].count == len(other) - len(shorter)
