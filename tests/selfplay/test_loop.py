"""Whole loops: every method on a tiny model, books kept by hand, resumed, refused, spread over processes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from selfplay_files import ScriptedEngine, read_jsonl, write_jsonl
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from fastpo.cli import main
from fastpo.demo.words import draw_word_problems, prepare_loop
from fastpo.selfplay import conversation, loop_config, training
from fastpo.selfplay import generate as generate_module
from fastpo.selfplay import loop as loop_module
from fastpo.selfplay import score as score_module
from fastpo.selfplay.engines.transformers_engine import TransformersEngine
from fastpo.selfplay.loop import iterate
from fastpo.selfplay.loop_config import LoopConfig
from fastpo.selfplay.manifest import load_manifest, manifest_path
from fastpo.selfplay.stage import lock, seed_of
from fastpo.trainer import PreferenceConfig

TRAIN: dict[str, Any] = {
    "beta": 0.3, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_length": 64, "max_steps": 3,
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
SFT = {**{k: v for k, v in TRAIN.items() if k != "beta"}, "max_length": 128, "max_steps": 4}
OWN: dict[str, dict[str, Any]] = {
    "spin": {"scorer": None},
    "dnpo": {},
    "dpo": {"sampling": {"max_tokens": 12, "n": 3, "temperature": 1.5}},
    "synpo": {"sft": SFT, "prompts_per_iteration": 60, "max_repetition": 0.9},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``fastpo demo --prepare-loop`` writes, at a fiftieth of its size; the model knows nearly nothing."""
    torch.set_num_threads(1)
    return prepare_loop(tmp_path_factory.mktemp("loop") / "start", seed=1, scale=0.02)


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scorer that gives random-looking texts different scores."""
    (tmp_path / "loop_rules.py").write_text(
        "def score(prompt, response, row):\n    return sum(map(ord, response)) % 97 / 97\n"
    )
    monkeypatch.chdir(tmp_path)
    return "loop_rules:score"


@pytest.fixture
def settings(start: Path, tmp_path: Path, rules: str) -> Callable[..., dict[str, Any]]:
    def make(method: str, **changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "method": method, "model_name_or_path": str(start / "model"), "seeds": str(start / "seeds.jsonl"),
            "output_dir": str(tmp_path / method), "iterations": 2, "held_out": 8, "seed": 3,
            "engine": {"batch_size": 8, "device": "cpu"}, "sampling": {"max_tokens": 12, "temperature": 1.5},
            "eval_sampling": {"max_tokens": 12}, "scorer": {"kind": "callable", "function": rules},
            "train": TRAIN,
        }  # fmt: skip
        if method == "synpo":
            values |= {
                "corpus": str(start / "corpus.txt"),
                "generator_template": str(start / "generator.txt"),
                "improver_template": str(start / "improver.txt"),
            }
        return values | OWN[method] | changes

    return make


def run(values: dict[str, Any]) -> Path:
    return iterate(LoopConfig(**values))


def weights(model: Path) -> torch.Tensor:
    return load_file(model / "model.safetensors")["lm_head.weight"]


@pytest.fixture
def tagged_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt generator of so small a model writes no tags: every text of its is taken for a question."""
    from fastpo.selfplay import synpo

    words = [problem.prompt for problem in draw_word_problems(400, seed=9)[0]]
    questions = iter(words)
    monkeypatch.setattr(synpo, "parse_generated", lambda text: (next(questions), ""))


@pytest.mark.parametrize("method", ["spin", "dnpo", "dpo", "synpo"])
def test_a_loop_of_two_iterations(
    method: str, settings: Callable[..., Any], start: Path, tagged_prompts: None
) -> None:
    last = run(settings(method))
    root = last.parents[1]
    assert last == root / "iteration-2/model"
    models = [start / "model", root / "iteration-1/model", last]
    heads = [weights(model) for model in models]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    pairs = [read_jsonl(root / f"iteration-{k}/pairs.jsonl") for k in (1, 2)]
    assert all(pairs)
    mixed = read_jsonl(root / "iteration-2/dataset.jsonl")
    assert mixed == (pairs[1] if method == "dpo" else [*pairs[0], *pairs[1]])
    trained = load_manifest(last).identity["settings"]
    expected_start = models[0] if method == "synpo" else models[1]
    other_start = load_manifest(models[1]).identity["settings"]["start"]
    assert (trained["start"] == other_start) == (expected_start == models[0])
    assert trained["loss_type"] == {"dpo": "dpo", "synpo": "simpo"}.get(method, "spin")
    assert trained.get("method") == ("dnpo" if method == "dnpo" else None)
    seeds, held_out = (read_jsonl(root / f"seeds/{name}.jsonl") for name in ("train", "held_out"))
    assert len(held_out) == 8
    assert not {json.dumps(r["prompt"]) for r in seeds} & {
        json.dumps(r["prompt"]) for r in held_out
    }
    report = json.loads((root / "report.json").read_text())
    assert [entry["iteration"] for entry in report["evaluation"]] == [0, 1, 2]
    assert (root / "report.md").read_text().startswith(f"# {method} from ")
    if method != "spin":
        assert report["best_iteration"] in (0, 1, 2)
        assert 0 <= report["evaluation"][2]["win_rate_first"]["rate"] <= 1
        assert (root / "scores.png").stat().st_size > 5000
    if method == "dnpo":
        assert report["iterations"][0]["generated_winners"] == pytest.approx(
            sum(p["chosen_source"] == "response 0" for p in pairs[0]) / len(pairs[0])
        )
    if method == "synpo":
        assert all(p["chosen_source"] == "response 0" for p in mixed)
        made = {json.dumps(p["prompt"]) for p in mixed}
        assert not made & {json.dumps(r["prompt"]) for r in [*seeds, *held_out]}
    assert not list(root.rglob("*.partial"))


def test_run_again_nothing_is_made_and_more_iterations_go_on(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings("dnpo")
    root = run(values).parents[1]
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "_complete", lambda *_: 1 / 0)
        patch.setattr(training, "_run_here", lambda *_: 1 / 0)
        run(values)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.jsonl")} == before
    assert run({**values, "iterations": 3}) == root / "iteration-3/model"
    assert {p: p.stat().st_mtime_ns for p in before} == before
    report = json.loads((root / "report.json").read_text())
    assert len(report["iterations"]) == 3


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"threshold": 0.5}, "threshold: 0.0 → 0.5"),
        ({"sampling": {"max_tokens": 5, "temperature": 1.5}}, "sampling.max_tokens: 12 → 5"),
        ({"train": {**TRAIN, "beta": 1.0}}, "train.beta: 0.3 → 1.0"),
        ({"seed": 4}, "seed: 3 → 4"),
    ],
)
def test_a_directory_with_other_settings_is_refused(
    change: dict[str, Any], difference: str, settings: Callable[..., Any], tmp_path: Path
) -> None:
    values = settings("dnpo")
    root = tmp_path / "dnpo"
    root.mkdir()
    config = LoopConfig(**values)
    loop_module._claim(root, config)
    loop_module._claim(root, config)
    with pytest.raises(ValueError, match="is a loop with other settings") as error:
        run({**values, **change})
    assert difference in str(error.value)


def test_where_and_how_patiently_a_loop_is_computed_may_change(
    settings: Callable[..., Any], tmp_path: Path, start: Path
) -> None:
    judge = {
        "kind": "judge",
        "mode": "rubric",
        "engine": {"kind": "openai", "base_url": "http://x", "model": "m"},
    }
    values = settings("dnpo", scorer=judge)
    root = tmp_path / "dnpo"
    root.mkdir()
    loop_module._claim(root, LoopConfig(**values))
    moved = shutil.copytree(start / "model", tmp_path / "moved")
    patient = {
        **judge,
        "engine": {**judge["engine"], "concurrency": 3, "timeout": 9.0, "retries": 1},
    }
    other = {
        **values, "model_name_or_path": str(moved), "engine": {"batch_size": 8, "device": None},
        "iterations": 7, "launcher": "python", "isolate": True, "scorer": patient,
    }  # fmt: skip
    loop_module._claim(root, LoopConfig(**other))
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(ValueError, match="is a loop with other settings") as error:
        loop_module._claim(root, LoopConfig(**{**other, "seeds": str(seeds)}))
    assert "(the content of seeds changed; the content of model_name_or_path changed);" in str(
        error.value
    )
    elsewhere = {**judge, "engine": {**judge["engine"], "base_url": "http://y"}}
    with pytest.raises(ValueError, match=r"scorer\.engine\.base_url"):
        loop_module._claim(root, LoopConfig(**{**values, "scorer": elsewhere}))


def test_what_a_kill_left_of_the_settings_file_is_removed(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "spin"
    root.mkdir()
    left = root / ".loop.json.4711.tmp"
    left.write_text("{")
    loop_module._claim(root, LoopConfig(**settings("spin")))
    assert not left.exists()
    assert (root / "loop.json").is_file()


def test_a_directory_that_holds_something_else_is_refused(settings: Callable[..., Any]) -> None:
    values = settings("spin")
    root = Path(values["output_dir"])
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt and is no loop's"):
        run(values)


# ---- Books kept by hand ----

HUMAN = {"p1": "h1 good", "p2": "h2", "p3": "h3 good", "p4": "h4", "p5": "h5 good", "p6": "h6"}
# Scores of the scripted scorer: the number of "good"s.
ANSWERS = {  # model → prompt → answer
    0: {"p1": "a1", "p2": "a2 good", "p3": "a3 good", "p4": "a4", "p5": "a5", "p6": "h6"},
    1: {"p1": "b1 good good", "p2": "b2 good", "p3": "b3", "p4": "b4 good", "p5": "b5", "p6": "b6"},
}
DSL = [  # prompt, chosen, rejected, chosen_source by iteration
    [
        ("p1", "h1 good", "a1", "completion"),
        ("p2", "a2 good", "h2", "response 0"),
        ("p5", "h5 good", "a5", "completion"),
    ],
    [
        ("p1", "b1 good good", "h1 good", "response 0"),
        ("p2", "b2 good", "h2", "response 0"),
        ("p3", "h3 good", "b3", "completion"),
        ("p4", "b4 good", "h4", "response 0"),
        ("p5", "h5 good", "b5", "completion"),
    ],
]


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Engines and training that only look at which model it is: the number that its directory holds."""
    seen: dict[str, Any] = {"trained": [], "tuned": [], "scored": [], "training_seeds": []}

    def model_number(name: str) -> int | str:
        return json.loads((Path(name) / "number.json").read_text())

    def engine(settings: Any, model: str | None = None) -> ScriptedEngine:
        number = model_number(str(model))
        made = ScriptedEngine(lambda prompt: [seen["say"](number, prompt)])
        made.identity = lambda: {"kind": "scripted", "model": number, "chat_template_sha256": None}  # type: ignore[method-assign]
        return made

    def trains(
        kind: str, settings: Any, *, start: str, dataset: Path, output: Path, seed: int, **_: Any
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        number: int | str = len(seen["trained"]) + 1
        if kind == "sft":
            number = output.name
            seen["tuned"].append((output, model_number(start), read_jsonl(dataset)))
        else:
            seen["training_seeds"].append(seed)
            seen["trained"].append((model_number(start), read_jsonl(dataset)))
        (output / "number.json").write_text(json.dumps(number))

    class Goods:
        batch_rows = 1

        def identity(self) -> dict[str, Any]:
            return {"kind": "goods"}

        def score(self, batches: Any, counts: Any) -> Any:
            for batch in batches:
                for item in batch:
                    seen["scored"] += [(item.prompt, text, item.row) for text in item.responses]
                    yield item.number, [float(text.count("good")) for text in item.responses]

        def close(self) -> None:
            pass

    for module in (generate_module, loop_module):
        monkeypatch.setattr(module, "make_engine", engine)
    monkeypatch.setattr(loop_config, "make_engine", engine)
    monkeypatch.setattr(score_module, "make_scorer", lambda *_: Goods())
    monkeypatch.setattr(loop_module, "train_stage", trains)
    first = tmp_path / "first"
    first.mkdir()
    (first / "number.json").write_text("0")
    rows = [{"prompt": p, "completion": c} for p, c in HUMAN.items()]
    seen["values"] = {
        "model_name_or_path": str(first), "seeds": str(write_jsonl(tmp_path / "seeds.jsonl", rows)),
        "output_dir": str(tmp_path / "loop"), "iterations": 2, "held_out": 0,
        "scorer": {"kind": "callable", "function": "os:getcwd"}, "train": {"use_cpu": True},
    }  # fmt: skip
    return seen


def as_table(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["prompt"], r["chosen"], r["rejected"], r["chosen_source"]) for r in rows]


def test_dynamic_labelling_by_hand(books: dict[str, Any]) -> None:
    books["say"] = lambda number, prompt: ANSWERS[number][prompt]
    root = run({**books["values"], "method": "dnpo"}).parents[1]
    for k, expected in enumerate(DSL, start=1):
        assert as_table(read_jsonl(root / f"iteration-{k}/pairs.jsonl")) == expected
    counts = load_manifest(root / "iteration-1/pairs.jsonl").counts
    assert counts == {
        "in": 6, "out": 3, "small_gap": 2, "equal_answers": 1, "response_chosen": 1,
    }  # fmt: skip
    (start_1, data_1), (start_2, data_2) = books["trained"]
    assert (start_1, start_2) == (0, 1)
    assert as_table(data_1) == DSL[0]
    assert as_table(data_2) == [*DSL[0], *DSL[1]]
    winners = [
        e["generated_winners"] for e in json.loads((root / "report.json").read_text())["iterations"]
    ]
    assert winners == [pytest.approx(1 / 3), pytest.approx(3 / 5)]


def test_synpo_by_hand(books: dict[str, Any], tmp_path: Path) -> None:
    """Prompts from the generator; its answers are drafted by the newest model, improved, and compared with the
    first model's.
    """
    nouns = [
        "table",
        "chair",
        "window",
        "garden",
        "river",
        "mountain",
        "forest",
        "bridge",
        "market",
    ]
    rows = [
        {"prompt": f"{p} {' '.join(nouns[k : k + 4])}", "completion": c}
        for k, (p, c) in enumerate(HUMAN.items())
    ]
    questions = {
        "alpha": "q-alpha",
        "beta": "q-beta",
        "gamma": rows[1]["prompt"],
        "delta": "q-delta",
    }
    improved = {"q-alpha": "imp good", "q-beta": "imp", "q-delta": "imp good good"}

    def say(number: Any, prompt: str) -> str:
        if number == "generator":
            asked = next(word for word in questions if word in prompt)
            return f"<question>{questions[asked]}</question>"
        if number == "improver":
            return improved[prompt.split("|")[0]]
        if prompt.startswith("q-"):
            return f"own {number}" + (" good" if prompt == "q-delta" else "")
        return ANSWERS[number][prompt.split()[0]]

    books["say"] = say
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join([word] * 30 + ["tiny", "small"]) for word in questions))
    (tmp_path / "improver.txt").write_text("{question}|{draft}")
    seeds = write_jsonl(tmp_path / "seeds.jsonl", rows)
    values = {
        **books["values"], "method": "synpo", "seeds": str(seeds), "corpus": str(corpus), "threshold": 0.5,
        "prompts_per_iteration": 4, "improver_template": str(tmp_path / "improver.txt"), "iterations": 1,
        "sft": {"use_cpu": True},
    }  # fmt: skip
    root = run(values).parents[1]
    made = [row["prompt"] for row in read_jsonl(root / "iteration-1/prompts.jsonl")]
    assert sorted(made) == ["q-alpha", "q-beta", "q-delta"]
    counts = load_manifest(root / "iteration-1/prompts.jsonl").counts
    assert counts == {"in": 4, "out": 3, "known_prompt": 1}
    # gaps of 1, 0 and 1
    expected = {
        "q-alpha": ("q-alpha", "imp good", "own 0", "response 0"),
        "q-delta": ("q-delta", "imp good good", "own 0 good", "response 0"),
    }
    pairs = as_table(read_jsonl(root / "iteration-1/pairs.jsonl"))
    assert pairs == [expected[p] for p in made if p in expected]
    (generator, first, examples), (improver, first_again, improvements) = books["tuned"]
    assert (generator.name, improver.name, first, first_again) == ("generator", "improver", 0, 0)
    assert len(examples) == 6
    for row, example in zip(rows, examples, strict=True):
        own = [word for word in row["prompt"].split() if word in example["prompt"]]
        assert len(own) == 2
        assert row["prompt"] in example["completion"]
    # of the seeds whose given answer beats the model's own by more than 0.5: p1 and p5
    assert [(r["prompt"], r["completion"]) for r in improvements] == [
        (f"{rows[0]['prompt']}|a1", "h1 good"),
        (f"{rows[4]['prompt']}|a5", "h5 good"),
    ]
    ((start, data),) = books["trained"]
    assert start == 0
    assert as_table(data) == pairs


def test_two_iterations_of_synpo_by_hand(books: dict[str, Any], tmp_path: Path) -> None:
    """Who answers what, what is learnt from it, and which prompts are new, in the second iteration too."""
    nouns = [
        "table",
        "chair",
        "window",
        "garden",
        "river",
        "mountain",
        "forest",
        "bridge",
        "market",
    ]
    given = {**HUMAN, "p1": "h1 good good", "p3": "h3 good good good"}
    rows = [
        {"prompt": f"{p} {' '.join(nouns[k : k + 4])}", "completion": c}
        for k, (p, c) in enumerate(given.items())
    ]
    root = Path(books["values"]["output_dir"])

    def asked_by_the_generator(word: str) -> str:
        iteration = len(books["trained"]) + 1
        if word == "gamma":
            return read_jsonl(root / "seeds/held_out.jsonl")[0]["prompt"]
        # The second iteration asks alpha's question once more.
        return "q-alpha" if word == "alpha" else f"q-{word}-{iteration}"

    def say(number: Any, prompt: str) -> str:
        if number == "generator":
            word = next(w for w in ("alpha", "beta", "gamma", "delta") if w in prompt)
            return f"<question>{asked_by_the_generator(word)}</question>"
        if number == "improver":
            question, draft = prompt.split("|")
            return f"better {draft}" + ("" if "delta" in question else " good good")
        if prompt.startswith("q-"):
            return f"own {number}"
        return ANSWERS[number][prompt.split()[0]] if number < 2 else "evaluated"

    books["say"] = say
    corpus = tmp_path / "corpus.txt"
    words = ("alpha", "beta", "gamma", "delta")
    corpus.write_text("\n\n".join(" ".join([word] * 30 + ["tiny", "small"]) for word in words))
    (tmp_path / "improver.txt").write_text("{question}|{draft}")
    values = {
        **books["values"], "method": "synpo", "corpus": str(corpus), "prompts_per_iteration": 4,
        "seeds": str(write_jsonl(tmp_path / "seeds.jsonl", rows)), "held_out": 1, "threshold": 0.5,
        "improver_threshold": 1.5, "improver_template": str(tmp_path / "improver.txt"), "max_pairs": 50,
        "max_repetition": 0.9, "sft": {"use_cpu": True}, "sampling": {"max_tokens": 40},
        "eval_sampling": {"max_tokens": 12}, "seed": 0,
    }  # fmt: skip
    run(values)
    made = [
        {r["prompt"] for r in read_jsonl(root / f"iteration-{k}/prompts.jsonl")} for k in (1, 2)
    ]
    assert made == [{"q-alpha", "q-beta-1", "q-delta-1"}, {"q-beta-2", "q-delta-2"}]
    counts = [load_manifest(root / f"iteration-{k}/prompts.jsonl").counts for k in (1, 2)]
    assert [c["known_prompt"] for c in counts] == [1, 2]
    # The last model drafts, its improver makes it better, and the first model's answer is rejected.
    better = {1: "better own 0 good good", 2: "better own 1 good good"}
    expected = {
        k: {(p, better[k], "own 0", "response 0") for p in prompts if "delta" not in p}
        for k, prompts in ((1, made[0]), (2, made[1]))
    }
    for k in (1, 2):
        assert set(as_table(read_jsonl(root / f"iteration-{k}/pairs.jsonl"))) == expected[k]
    (start_1, data_1), (start_2, data_2) = books["trained"]
    assert start_1 == start_2 == 0
    assert set(as_table(data_1)) == expected[1]
    assert set(as_table(data_2)) == expected[1] | expected[2]
    # The improver starts from the first model each time, and learns from the last one's answers where the given
    # ones are better by more than 1.5 (p5's is by 1, p1's in iteration 2 no more).
    improvers = [entry for entry in books["tuned"] if entry[0].name == "improver"]
    assert [start for _, start, _ in improvers] == [0, 0]
    learnt = [[row["prompt"].split("|")[1] for row in examples] for _, _, examples in improvers]
    assert learnt == [["a1", "a3 good"], ["b3"]]
    # Nothing is drawn by the same seed twice, and the run's own decides.
    assert len(set(books["training_seeds"])) == 2
    stages = (
        "drafts",
        "seed-responses",
        "seed-scored",
        "scored",
        "improved",
        "pairs",
        "prompts.generated",
    )
    seeds = [
        load_manifest(root / f"iteration-{k}/{stage}.jsonl").identity["settings"]["seed"]
        for k in (1, 2) for stage in stages
    ]  # fmt: skip
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & {0, values["seed"]}
    other = {**values, "seed": 99, "output_dir": str(tmp_path / "other")}
    loop = loop_module._Loop(LoopConfig(**other), tmp_path / "other")
    assert not {loop._seed(k, stage) for k in (1, 2) for stage in stages} & set(seeds)
    # Filters and sampling are those that were set.
    of_pairs = load_manifest(root / "iteration-2/pairs.jsonl").identity["settings"]
    assert (of_pairs["max_pairs"], of_pairs["max_repetition"]) == (50, 0.9)
    assert of_pairs["threshold"] == 0.5
    sampled = [
        load_manifest(root / name).identity["settings"]["sampling"]["max_tokens"]
        for name in ("iteration-1/drafts.jsonl", "evaluation/iteration-1/responses.jsonl")
    ]
    assert sampled == [40, 12]


GOLD = {**HUMAN, "p1 ": "h1 bad", "P2?": "h2 bad"}  # the last two are p1 and p2 once more


def test_held_out_prompts_are_not_trained_on_in_any_of_their_rows(books: dict[str, Any]) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in GOLD.items()]
    seeds = Path(books["values"]["seeds"])
    write_jsonl(seeds, rows)
    books["say"] = lambda number, prompt: f"{number} good"
    held_out = set()
    for seed in range(6):
        values = {**books["values"], "method": "dnpo", "held_out": 3, "iterations": 1, "seed": seed}
        root = run({**values, "output_dir": f"{values['output_dir']}-{seed}"}).parents[1]
        sides = [
            [
                row["prompt"].strip().lower().rstrip("?")
                for row in read_jsonl(root / f"seeds/{name}.jsonl")
            ]
            for name in ("train", "held_out")
        ]
        assert not set(sides[0]) & set(sides[1])
        assert set(sides[0]) | set(sides[1]) == set(HUMAN)
        assert len(sides[1]) == len(set(sides[1])) == 3
        counts = load_manifest(root / "seeds/held_out.jsonl").counts
        repeated = len(rows) - len(sides[0]) - 3
        assert counts == {"in": 3 + repeated, "out": 3} | (
            {"repeated_prompt": repeated} if repeated else {}
        )
        held_out.add(tuple(sides[1]))
    assert len(held_out) > 1  # drawn, not the first ones


def test_the_draw_of_distinct_prompts_is_that_of_their_rows(books: dict[str, Any]) -> None:
    books["say"] = lambda number, prompt: f"{number} good"
    root = run(
        {**books["values"], "method": "dnpo", "held_out": 2, "iterations": 1, "seed": 4}
    ).parents[1]
    drawn = random.Random(seed_of(4, "held out")).sample(range(6), 2)
    expected = [list(HUMAN)[k] for k in sorted(drawn)]
    assert [row["prompt"] for row in read_jsonl(root / "seeds/held_out.jsonl")] == expected


def test_a_comparison_keeps_the_columns_a_scorer_reads_and_scores_no_answer_twice(
    books: dict[str, Any],
) -> None:
    rows = [{"prompt": p, "completion": c, "gold": c[-1]} for p, c in HUMAN.items()]
    write_jsonl(Path(books["values"]["seeds"]), rows)
    books["say"] = lambda number, prompt: f"{number} of {prompt}" + " good" * int(number == 1)
    values = {**books["values"], "method": "dnpo", "held_out": 3, "iterations": 2}
    root = run(values).parents[1]
    in_evaluation = [c for c in books["scored"] if c[2]["prompt"] in held_out_prompts(root)]
    assert len(in_evaluation) == 3 * 3  # one score for each model and prompt
    compared = read_jsonl(root / "evaluation/iteration-2/versus-previous-scored.jsonl")
    assert [row["gold"] for row in compared] == [row["completion"][-1] for row in compared]
    for row in compared:
        assert row["responses"] == [f"2 of {row['prompt']}", f"1 of {row['prompt']} good"]
        assert row["scores"] == [0.0, 1.0]
    report = json.loads((root / "report.json").read_text())["evaluation"]
    assert report[1]["win_rate_first"]["rate"] == 1
    assert report[2]["win_rate_previous"]["rate"] == 0
    assert report[2]["win_rate_first"]["rate"] == 0.5


def test_candidates_side_by_side_are_matched_by_prompt(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    loop = loop_module._Loop(LoopConfig(**settings("spin")), tmp_path)
    files = [
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [
                {
                    "prompt": p,
                    "gold": name,
                    "responses": [f"{name}{p}"],
                    "finish_reasons": ["stop"],
                    "scores": [1.0],
                }
                for p in prompts
            ],
        )
        for name, prompts in (("a", "xyz"), ("b", "wxz"))
    ]
    rows = read_jsonl(loop._beside(tmp_path / "both.jsonl", files))
    assert rows == [{"prompt": p, "gold": "a", "responses": [f"a{p}", f"b{p}"]} for p in "xz"]


def held_out_prompts(root: Path) -> set[str]:
    return {row["prompt"] for row in read_jsonl(root / "seeds/held_out.jsonl")}


CONVERSATION = [
    {"role": "user", "content": "first question"}, {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "last question"}, {"role": "assistant", "content": "last answer"},
]  # fmt: skip


def test_question_and_answer_come_from_the_same_conversation(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "first question", "messages": CONVERSATION},
        {"prompt": "p", "completion": "c"},
    ]
    values = settings("spin", seeds=str(write_jsonl(tmp_path / "rows.jsonl", rows)), held_out=0)
    loop_module._Loop(LoopConfig(**values), tmp_path / "loop")._split_seeds()
    row = read_jsonl(tmp_path / "loop/seeds/train.jsonl")[0]
    assert (row["prompt"], row["completion"]) == (CONVERSATION[:-1], CONVERSATION[-1:])


def test_a_prompt_that_a_stage_wrote_beside_its_messages_stands() -> None:
    asked = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:3]]
    row = {"prompt": asked, "messages": CONVERSATION}
    assert conversation.read_prompt(row, "row") == asked
    assert conversation.read_completion(row, "row") == "last answer"
    row = {"prompt": "first question", "messages": CONVERSATION[:2]}
    assert conversation.read_prompt(row, "row") == "first question"


def test_dpo_takes_messages_that_end_with_the_question(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"messages": CONVERSATION[:3]}, {"messages": CONVERSATION}]
    values = settings("dpo", seeds=str(write_jsonl(tmp_path / "rows.jsonl", rows)), held_out=0)
    loop_module._Loop(LoopConfig(**values), tmp_path / "loop")._split_seeds()
    asked, answered = read_jsonl(tmp_path / "loop/seeds/train.jsonl")
    assert asked == {"prompt": CONVERSATION[:3]}
    assert answered == {"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}


def test_the_system_prompt_stands_in_the_seeds(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    values = settings("spin", system_prompt="Be brief.", chat=True, held_out=0)
    loop_module._Loop(LoopConfig(**values), tmp_path / "loop")._split_seeds()
    for row in read_jsonl(tmp_path / "loop/seeds/train.jsonl"):
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]
        assert row["prompt"][0]["content"] == "Be brief."


def test_training_takes_the_chat_template_of_generation(settings: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    engine = {"chat_template": template}
    config = LoopConfig(**settings("synpo", engine=engine))
    assert config.train_settings_of(1)["chat_template"] == template
    assert config.sft_settings["chat_template"] == template
    own = LoopConfig(**settings("spin", engine=engine, train={**TRAIN, "chat_template": "{{ 1 }}"}))
    assert own.train_settings["chat_template"] == "{{ 1 }}"
    assert "chat_template" not in LoopConfig(**settings("spin")).train_settings


def test_nothing_left_to_train_on_says_where_to_look(books: dict[str, Any]) -> None:
    books["say"] = lambda number, prompt: "x"
    values = {**books["values"], "method": "dnpo", "threshold": 9.0}
    with pytest.raises(
        ValueError,
        match=r"iteration 1: no pair is left to train on; of 6 rows were left out: small_gap 6 ",
    ):
        run(values)


# ---- Processes, search, adapters ----


def test_processes_of_their_own_make_the_same(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(settings("dnpo", iterations=1)).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    values = settings("dnpo", iterations=1, isolate=True, launcher="python")
    there = run({**values, "output_dir": str(tmp_path / "apart")}).parents[1]
    for name in ("responses", "scored", "pairs", "dataset"):
        files = [root / f"iteration-1/{name}.jsonl" for root in (here, there)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert torch.equal(weights(here / "iteration-1/model"), weights(there / "iteration-1/model"))


def test_a_launched_command_that_fails_stops_the_loop(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    values = settings("spin", iterations=1, launcher="python -c 'raise SystemExit(3)'")
    with pytest.raises(ChildProcessError, match=r"launcher: .* ended with status 3"):
        run(values)


def test_a_search_goes_on_with_the_best_on_held_out_prompts(settings: Callable[..., Any]) -> None:
    values = settings("dpo", iterations=1, search={"beta": [0.1, 5.0], "learning_rate": ["1e-3"]})
    chosen = run(values)
    account = json.loads((chosen.parents[1] / "search.json").read_text())
    assert account["selected"] == str(chosen)
    assert [c["settings"] for c in account["candidates"]] == [
        {"beta": 0.1, "learning_rate": "1e-3"}, {"beta": 5.0, "learning_rate": "1e-3"},
    ]  # fmt: skip
    best = max(account["candidates"], key=lambda c: c["value"])
    assert best["model"] == str(chosen)
    # What it chose by is the evaluation, which is not made again.
    evaluation = chosen.parents[2] / "evaluation/iteration-1"
    for name in ("responses.jsonl", "scored.jsonl"):
        copied = manifest_path(evaluation / name)
        assert copied.read_bytes() == manifest_path(chosen.parent / name).read_bytes()
    scores = [row["scores"][0] for row in read_jsonl(evaluation / "scored.jsonl")]
    assert best["value"] == pytest.approx(sum(scores) / len(scores))
    assert "biased upward" in (chosen.parents[2] / "report.md").read_text()


@pytest.fixture
def ranker(start: Path, tmp_path: Path) -> Path:
    """A classifier with one label and random weights: its preferences are arbitrary, and not 0."""
    path = tmp_path / "ranker"
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    torch.manual_seed(2)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_labels=1, initializer_range=1.0, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    return path


def test_a_scorer_that_only_compares_chooses_by_the_lead_over_the_start(
    settings: Callable[..., Any], ranker: Path
) -> None:
    scorer = {"kind": "ranker", "model": str(ranker), "device": "cpu"}
    values = settings(
        "dpo", iterations=2, scorer=scorer, search={"learning_rate": [1e-9, 1e-2]}, held_out=16
    )
    root = run(values).parents[2]
    leads = {0: 0.0}
    for k in (1, 2):
        account = json.loads((root / f"iteration-{k}/search.json").read_text())
        tried = {c["model"]: c["value"] for c in account["candidates"]}
        assert len(set(tried.values())) == 2
        assert tried[account["selected"]] == max(tried.values())
        # The search's number is the evaluation's, and it is the lead of the answers themselves.
        leads[k] = max(tried.values())
        name = "versus-previous-scored" if k == 1 else "versus-first-scored"
        trial = Path(account["selected"]).parent
        copied = manifest_path(root / f"evaluation/iteration-{k}/{name}.jsonl")
        assert copied.read_bytes() == manifest_path(trial / f"{name}.jsonl").read_bytes()
        rows = read_jsonl(root / f"evaluation/iteration-{k}/{name}.jsonl")
        assert leads[k] == pytest.approx(sum(a - b for a, b in (r["scores"] for r in rows)) / 16)
    report = json.loads((root / "report.json").read_text())
    assert not any("score" in entry for entry in report["evaluation"])
    assert not list((root / "evaluation").rglob("scored.jsonl"))
    assert report["best_iteration"] == max(leads, key=lambda k: (leads[k], -k))
    assert "Best mean lead over the start" in (root / "report.md").read_text()
    assert (root / "scores.png").is_file()


def test_settings_of_later_iterations_hold_from_them_on(settings: Callable[..., Any]) -> None:
    later = {2: {"learning_rate": 1e-5}, "3": {"beta": 0.7}}
    last = run(settings("spin", iterations=3, train_from=later))
    found = []
    for k in (1, 2, 3):
        manifest = load_manifest(last.parents[1] / f"iteration-{k}/model")
        assert manifest is not None
        found.append(
            (manifest.identity["settings"]["learning_rate"], manifest.identity["settings"]["beta"])
        )
    rate, beta = TRAIN["learning_rate"], TRAIN["beta"]
    assert found == [(rate, beta), (1e-5, beta), (1e-5, 0.7)]


def test_later_settings_win_over_earlier_ones(settings: Callable[..., Any]) -> None:
    later = {3: {"beta": 0.9}, 2: {"beta": 0.7}}
    config = LoopConfig(**settings("spin", train_from=later))
    assert [config.train_settings_of(k)["beta"] for k in (1, 2, 3, 4)] == [0.3, 0.7, 0.9, 0.9]


def test_the_noise_may_begin_later(settings: Callable[..., Any]) -> None:
    """DNPO without noise in its first iteration."""
    values = settings(
        "dnpo", train={**TRAIN, "method": "preference"},
        train_from={2: {"method": "dnpo", "noise_alpha": 0.5}},
    )  # fmt: skip
    root = run(values).parents[1]
    found = [load_manifest(root / f"iteration-{k}/model").identity["settings"] for k in (1, 2)]
    assert [s["method"] for s in found] == ["preference", "dnpo"]
    assert [s.get("noise_alpha") for s in found] == [None, 0.5]
    logs = [
        json.loads((root / f"iteration-{k}/model/trainer_state.json").read_text()) for k in (1, 2)
    ]
    assert ["noise/penalty" in log["log_history"][0] for log in logs] == [False, True]


def test_an_adapter_is_merged_into_the_model_that_goes_on(
    settings: Callable[..., Any], start: Path
) -> None:
    peft = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = run(settings("spin", iterations=1, train={**TRAIN, "peft": peft}))
    tensors = [load_file(m / "model.safetensors") for m in (start / "model", model)]
    assert tensors[0].keys() == tensors[1].keys()
    changed = {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)
    assert not list(model.glob("adapter*"))


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": {"kind": "callable", "function": "no_such_module:f"}}, "no_such_module"),
        ({"scorer": {"kind": "callable", "function": "loop_rules"}}, "expected module:function"),
        ({"scorer": {"kind": "reward_model", "model": "/no/model"}}, "/no/model"),
        ({"corpus": "empty.txt"}, "no paragraph of 20 words or more"),
        ({"corpus": "plain.txt"}, r"has no paragraph with 3 usable keywords \(of 1\)"),
        ({"stopwords": "plain.txt"}, "expected one word"),
        ({"generator_template": "plain.txt"}, r"no placeholder \{keywords\}"),
        ({"improver_template": "plain.txt"}, r"no placeholder \{question\}"),
    ],
)
def test_what_is_needed_late_is_looked_at_before_anything_is_made(
    change: dict[str, Any], message: str, settings: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "plain.txt").write_text("The " * 30)
    values = settings("synpo", **change)
    with pytest.raises((ValueError, ImportError, FileNotFoundError), match=message):
        run(values)
    assert not Path(values["output_dir"]).exists()


def test_a_second_process_is_told_the_field(settings: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "spin").mkdir()
    with (
        lock(tmp_path / "spin/lock", tmp_path),
        pytest.raises(ValueError, match=r"^output_dir: another process is at work on .*spin$"),
    ):
        run(settings("spin"))


def test_a_generator_that_makes_no_prompt_is_named(settings: Callable[..., Any]) -> None:
    # As trained here, for four steps, it writes no tags.
    with pytest.raises(
        ValueError, match=r"none of the \d+ texts .* \(unparsable \d+\); .*generated\.jsonl"
    ):
        run(settings("synpo"))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("spin", {"method": "spon"}, "method: got 'spon', expected one of spin, dnpo, synpo, dpo"),
        ("spin", {"iterations": 0}, "iterations: got 0"),
        ("spin", {"sampling": {"n": 2}}, r"sampling\.n: got 2, expected 1 with method 'spin'"),
        ("spin", {"engine": {"kind": "openai"}}, r"engine\.kind: got 'openai', expected transformers or vllm"),
        ("spin", {"engine": {"model": "x"}}, r"engine\.model: the loop sets it"),
        ("spin", {"train": {"learning_rte": 1}}, "train: unknown field 'learning_rte', did you"),
        ("spin", {"train": {"dataset": "x"}}, r"train\.dataset: the loop sets it"),
        ("spin", {"train": {"beta": -1}}, "train: beta: got -1"),
        ("spin", {"threshold": 0.5}, "threshold: has no effect with method 'spin'"),
        (
            "dpo",
            {"search": {"beta": [1]}, "train_from": {2: {"beta": 2}}},
            r"train_from\.2\.beta: has no effect, search varies it",
        ),
        ("spin", {"corpus": "x.txt"}, "corpus: has no effect with method 'spin'"),
        ("dnpo", {"scorer": None}, "scorer: got None, expected one: method 'dnpo' compares answers"),
        ("dnpo", {"threshold": -1}, "threshold: got -1"),
        ("dpo", {"sampling": {"n": 1}}, r"sampling\.n: got 1, expected ≥ 2 with method 'dpo'"),
        ("spin", {"train_from": {"x": {}}}, "train_from: got 'x', expected the number of an iteration"),
        ("spin", {"train_from": {2: {"beta": -1}}}, r"train_from\.2: beta: got -1"),
        ("spin", {"train_from": {2: 1e-7}}, r"train_from\.2: got 1e-07, expected a mapping"),
        ("dpo", {"search": {"beta": 0.1}}, r"search\.beta: got 0\.1, expected a list"),
        ("dpo", {"search": {"gamma": [1]}}, r"search\.gamma: unknown field 'gamma'"),
        ("dpo", {"held_out": 0, "search": {"beta": [1]}}, "search: needs a scorer and held_out > 0"),
        ("synpo", {"corpus": None}, "corpus: got None, expected one with method 'synpo'"),
        ("synpo", {"mix_iterations": 2}, "mix_iterations: has no effect with method 'synpo'"),
        ("synpo", {"sft": {"lr": 1}}, "sft: unknown field 'lr'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_settings_are_named(
    method: str, change: dict[str, Any], message: str, settings: Callable[..., Any]
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LoopConfig(**{**settings(method), **change})


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (
            [{"prompt": f"p{k}"} for k in range(20)],
            {},
            r"line \d+: no answer, expected a column 'completion'",
        ),
        (
            [{"prompt": f"p{k}", "completion": "c"} for k in (*range(8), *range(8))],
            {},
            "held_out: got 8, expected less than the 8 different prompts",
        ),
        ([], {}, r"seeds: .*rows\.jsonl has no rows"),
        ([{"text": "p"}], {}, r"seeds: .*line 1: no 'prompt' \(the row has 'text'\)"),
        (
            [{"prompt": "p", "completion": "c"}],
            {"system_prompt": "Be brief.", "chat": False},
            r"system_prompt: has no effect without chat on prompts that are text, as in .*line 1",
        ),
        (None, {"seeds": "none.jsonl"}, r"^seeds: no file 'none\.jsonl'"),
        (
            None,
            {"model_name_or_path": "/no/model"},
            "^model_name_or_path: /no/model is not a directory",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(
    rows: Any, change: dict[str, Any], message: str, settings: Callable[..., Any], tmp_path: Path
) -> None:
    if rows is not None:
        change = {**change, "seeds": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(settings("spin", **change))


def test_a_corpus_without_keywords_is_named(
    settings: Callable[..., Any], tmp_path: Path, tagged_prompts: None
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(["The"] * 30) + "\n\n" + " ".join(["and of"] * 20))
    with pytest.raises(ValueError, match=r"has no paragraph with 3 usable keywords \(of 2\)"):
        run(settings("synpo", corpus=str(corpus)))
    corpus.write_text("")
    with pytest.raises(ValueError, match="no paragraph of 20 words or more"):
        run(settings("synpo", corpus=str(corpus), output_dir=str(tmp_path / "other")))


def test_the_command_tells_a_mistake_in_one_line(
    settings: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    file = tmp_path / "loop.yaml"
    file.write_text(yaml.safe_dump(settings("spin")))
    assert main(["iterate", "--config", str(file), "--method", "spon"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["iterate", "--config", str(file), "--stage", "x"]) == 2
    assert "unknown field 'stage'" in capsys.readouterr().err


def test_defaults_of_a_method_are_fields_of_the_trainer() -> None:
    from fastpo.selfplay.loop_config import METHODS, TRAIN_DEFAULTS

    for method in METHODS:
        assert PreferenceConfig(output_dir="x", use_cpu=True, **TRAIN_DEFAULTS[method]).loss_type
