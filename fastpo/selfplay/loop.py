"""``fastpo iterate``: SPIN, DNPO, SynPO or iterative DPO as a whole, from one checkpoint to its k-th successor.

Everything is a stage with a manifest (``stage``, ``training``), so a loop that was killed, or is given more
iterations, goes on where it is. ``output_dir`` holds

    loop.json                    the settings; other ones are refused
    seeds/                       the seed rows: train.jsonl, held_out.jsonl
    synpo/                       the prompt generator and its examples
    iteration-K/                 what iteration K made: responses, scores, pairs, dataset.jsonl, model/
    evaluation/iteration-K/      responses to the held-out prompts, scores, comparisons
    report.md, report.json, *.png
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastpo.atomic_write import remove_leftovers, write_atomically
from fastpo.plain_values import plain, without_logins

from .conversation import (
    answer,
    as_conversation,
    has_completion,
    prompt_text,
    read_completion,
    read_prompt,
    read_responses,
    read_scores,
)
from .engines import make_engine
from .generate import GenerateConfig, generate, is_chat
from .loop_config import MAY_CHANGE, LoopConfig
from .manifest import SUFFIX, differences, load_manifest, manifest_path, model_revision, sha256
from .pairs import PairsConfig, make_pairs
from .report import report_loop
from .rows import Row, read_rows
from .score import ScoreConfig, score
from .stage import lock, seed_of, write_stage
from .synpo import (
    ImproveConfig,
    PromptsConfig,
    generator_examples,
    improve,
    improver_examples,
    make_prompts,
)
from .text_measures import normalised
from .training import train_stage

SETTINGS_FILE = "loop.json"
# Columns that belong to the responses of one file, not to their prompt.
OF_RESPONSES = ("responses", "finish_reasons", "scores", "completion_score")


def iterate(config: LoopConfig) -> Path:
    """Run a loop to its end, or go on with it, and write its report.

    Returns:
        The last iteration's checkpoint directory.

    Raises:
        ChildProcessError: a launched command failed.
        EngineError, ScorerError: no text or score could be made; finished rows are kept.
        FileNotFoundError, ImportError, TypeError, ValueError: settings, files or packages that cannot be used;
            a directory of a loop with other settings (the differences are listed).
        FloatingPointError: training stopped at a loss that is not finite.
    """
    config.check_files()
    root = Path(config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    with lock(root / "lock", root, field="output_dir"):
        _claim(root, config)
        loop = _Loop(config, root)
        model = loop.run()
        print(f"report: {report_loop(root)}", flush=True)
    return model


def _claim(root: Path, config: LoopConfig) -> None:
    """Record the settings, or refuse a directory that has others.

    Seeds, corpus and start count by their content, wherever they lie.
    """
    settings = _without(dataclasses.asdict(config), MAY_CHANGE)
    settings |= {"output_dir": None, "seeds": sha256(Path(config.seeds))}
    settings["model"] = model_revision(config.model_name_or_path)
    if config.corpus is not None:
        settings["corpus"] = sha256(Path(config.corpus))
    now = json.loads(without_logins(json.dumps(plain(settings))))
    file = root / SETTINGS_FILE
    remove_leftovers(file)
    if not file.is_file():
        others = [path.name for path in root.iterdir() if path.name != "lock"]
        if others:
            raise ValueError(
                f"output_dir: {root} holds {others[0]} and is no loop's; expected a new directory"
            )
        write_atomically(file, (json.dumps(now, indent=1, ensure_ascii=False) + "\n").encode())
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    contents = ("seeds", "corpus", "model")
    changed = [
        f"the content of {'model_name_or_path' if name == 'model' else name} changed"
        for name in contents
        if before.get(name) != now.get(name)
    ]
    ignored = (*contents, "model_name_or_path", *MAY_CHANGE)
    changed += differences(_without(before, ignored), _without(now, ignored))
    if changed:
        raise ValueError(
            f"output_dir: {root} is a loop with other settings ({'; '.join(changed)}); expected the same (but "
            f"for {', '.join(MAY_CHANGE)}), or another directory"
        )


def _without(settings: Mapping[str, Any], names: Iterable[str], inside: str = "") -> dict[str, Any]:
    """Settings without those of the given names, ``outer.inner`` for one in a mapping."""
    kept = {}
    for key, value in settings.items():
        name = f"{inside}{key}"
        if name not in names:
            kept[key] = _without(value, names, f"{name}.") if isinstance(value, Mapping) else value
    return kept


class _Loop:
    """One loop: its models by iteration (0: the start), and how each next one is made."""

    def __init__(self, config: LoopConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.models = [config.model_name_or_path]
        engine = make_engine(config.engine_settings, config.model_name_or_path)
        self.chat = is_chat(engine, config.chat)
        self.seeds = root / "seeds/train.jsonl"
        self.held_out = root / "seeds/held_out.jsonl"

    def run(self) -> Path:
        self._split_seeds()
        make_dataset = {
            "spin": self._spin,
            "dnpo": self._dnpo,
            "synpo": self._synpo,
            "dpo": self._dpo,
        }[self.config.method]
        self._evaluate(0, self.models[0])
        for k in range(1, self.config.iterations + 1):
            print(f"\niteration {k} of {self.config.iterations}", flush=True)
            dataset = make_dataset(k)
            self.models.append(self._train(k, dataset))
            self._evaluate(k, self.models[k])
        return Path(self.models[-1])

    # ---- Seeds ----

    def _split_seeds(self) -> None:
        """Seed rows in one form; prompts that are held out are drawn at random.

        All rows of a prompt are on one side, else a model would be trained on what it is evaluated on. Of a
        held-out prompt that comes several times the first row stays, the others are counted.
        """
        config, source = self.config, Path(self.config.seeds)
        prompts = list(dict.fromkeys(self._seed_keys(source)))
        if not prompts:
            raise ValueError(f"seeds: {source} has no rows")
        if len(prompts) <= config.held_out:
            raise ValueError(
                f"held_out: got {config.held_out}, expected less than the {len(prompts)} different prompts of "
                f"{source}"
            )
        draw = random.Random(seed_of(config.seed, "held out"))
        held_out = {prompts[k] for k in draw.sample(range(len(prompts)), config.held_out)}

        def make(wanted: bool, counts: Counter[str]) -> Iterator[Row]:
            seen: set[int] = set()
            keys = self._seed_keys(source)
            for key, (where, row) in zip(keys, read_rows(source), strict=True):
                if (key in held_out) != wanted:
                    continue
                counts["in"] += 1
                if wanted and key in seen:
                    counts["repeated_prompt"] += 1
                    continue
                if wanted:
                    seen.add(key)
                prompt = read_prompt(row, where)
                if self.chat or not isinstance(prompt, str):
                    prompt = as_conversation(prompt, config.system_prompt)
                made = {"prompt": prompt}
                if config.method != "dpo" or has_completion(row, where):
                    made["completion"] = answer(prompt, read_completion(row, where))
                others = {
                    k: v for k, v in row.items() if k not in ("prompt", "completion", "messages")
                }
                yield {**made, **others}

        for path, wanted in ((self.seeds, False), (self.held_out, True)):
            settings = {
                "held_out": config.held_out,
                "wanted": wanted,
                "chat": self.chat,
                "system_prompt": config.system_prompt,
                "seed": config.seed,
            }
            if wanted and not config.held_out:
                continue
            write_stage("seeds", path, {"rows": source}, settings, functools.partial(make, wanted))

    def _seed_keys(self, source: Path) -> Iterator[int]:
        """A hash of every row's prompt, alike for what :func:`~.text_measures.normalised` makes alike."""
        for where, row in read_rows(source):
            try:
                prompt = read_prompt(row, where)
            except ValueError as error:
                raise ValueError(f"seeds: {error}") from error
            if isinstance(prompt, str) and not self.chat and self.config.system_prompt is not None:
                raise ValueError(
                    f"system_prompt: has no effect without chat on prompts that are text, as in {where}"
                )
            yield seed_of(normalised(prompt_text(prompt)))

    # ---- What an iteration trains on ----

    def _spin(self, k: int) -> Path:
        responses = self._generate(k, self.seeds, self.models[k - 1], "responses")
        self._pairs(k, responses, "spin")
        return self._mixed(k)

    def _dnpo(self, k: int) -> Path:
        responses = self._generate(k, self.seeds, self.models[k - 1], "responses")
        scored = self._score(self._path(k, "scored"), responses, completion=True, k=k)
        self._pairs(k, scored, "dsl")
        return self._mixed(k)

    def _dpo(self, k: int) -> Path:
        responses = self._generate(k, self.seeds, self.models[k - 1], "responses")
        scored = self._score(self._path(k, "scored"), responses, k=k)
        self._pairs(k, scored, "best_worst")
        return self._mixed(k)

    def _synpo(self, k: int) -> Path:
        first, previous = self.models[0], self.models[k - 1]
        prompts = self._synthetic_prompts(k)
        improver = self._improver(k, previous)
        drafts = self._generate(k, prompts, previous, "drafts")
        improved = self._path(k, "improved")
        self._run(
            "improve",
            ImproveConfig(
                str(drafts), str(improved), improver, self.config.engine, self.config.sampling, self.chat,
                self.config.improver_template, self._seed(k, "improved"),
            ),
        )  # fmt: skip
        base = drafts if k == 1 else self._generate(k, prompts, first, "first")
        candidates = self._beside(self._path(k, "candidates"), [improved, base])
        scored = self._score(self._path(k, "scored"), candidates, k=k)
        self._pairs(k, scored, "ordered")
        return self._joined(k, range(1, k + 1))

    def _synthetic_prompts(self, k: int) -> Path:
        """Prompts that the generator, trained once, makes from keywords of the corpus."""
        config, made = self.config, self.root / "synpo"
        examples = made / "generator.jsonl"
        generator_examples(
            self.seeds, examples, chat=self.chat, stopwords=config.stopwords,
            template=config.generator_template, seed=config.seed,
        )  # fmt: skip
        model = made / "generator"
        self._fine_tune(examples, model, "generator")
        prompts = self._path(k, "prompts")
        earlier = [str(self._path(i, "prompts")) for i in range(1, k)]
        held_out = [str(self.held_out)] if config.held_out else []
        assert config.corpus is not None
        assert config.prompts_per_iteration is not None
        self._run(
            "prompts",
            PromptsConfig(
                config.corpus, str(prompts), config.prompts_per_iteration, str(model), config.engine,
                config.sampling, self.chat, [str(self.seeds), *held_out, *earlier], config.stopwords,
                config.generator_template, self._seed(k, "prompts"),
            ),
        )  # fmt: skip
        manifest = load_manifest(prompts)
        assert manifest is not None
        if not manifest.counts["out"]:
            raise ValueError(
                f"iteration {k}: none of the {manifest.counts['in']} texts of the prompt generator is a new "
                f"prompt ({_reasons(manifest.counts)}); it may need more training "
                f"(sft): see {prompts.with_suffix('')}.generated.jsonl"
            )
        return prompts

    def _improver(self, k: int, previous: str) -> str:
        """The improver of iteration k, trained from the start on what the seeds' answers do better."""
        config = self.config
        own = self._generate(k, self.seeds, previous, "seed-responses")
        scored = self._score(self._path(k, "seed-scored"), own, completion=True, k=k)
        examples = self._path(k, "improver")
        threshold = (
            config.threshold if config.improver_threshold is None else config.improver_threshold
        )
        improver_examples(
            scored, examples, chat=self.chat, threshold=threshold, template=config.improver_template
        )
        return self._fine_tune(examples, self.root / f"iteration-{k}/improver", "improver")

    # ---- Steps ----

    def _generate(self, k: int, prompts: Path, model: str, name: str) -> Path:
        output = self._path(k, name)
        self._run(
            "generate",
            GenerateConfig(
                str(prompts), str(output), model, self.config.engine, self.config.sampling, self.chat,
                self.config.system_prompt, self._seed(k, name),
            ),
        )  # fmt: skip
        return output

    def _score(self, output: Path, responses: Path, completion: bool = False, *, k: int) -> Path:
        scorer = dict(plain(dataclasses.asdict(self.config)["scorer"]))
        if scorer.get("kind") == "logprob" and scorer.get("model") is None:
            scorer["model"] = self.models[0]
            if scorer.get("chat_template") is None:
                scorer["chat_template"] = self.config.engine_settings.chat_template
        seed = seed_of(self.config.seed, "score", f"iteration-{k}", output.stem)
        self._run("score", ScoreConfig(str(responses), str(output), scorer, completion, seed))
        return output

    def _pairs(self, k: int, scored: Path, rule: str) -> None:
        config = self.config
        make_pairs(
            PairsConfig(
                str(scored), str(self._path(k, "pairs")), rule, config.threshold, config.max_repetition,
                config.max_pairs, self._seed(k, "pairs"),
            )
        )  # fmt: skip

    def _mixed(self, k: int) -> Path:
        return self._joined(k, range(max(1, k - self.config.mixed + 1), k + 1))

    def _joined(self, k: int, iterations: Sequence[int]) -> Path:
        """The pairs of some iterations in one file."""
        files = {f"iteration {i}": self._path(i, "pairs") for i in iterations}

        def make(counts: Counter[str]) -> Iterator[Row]:
            for path in files.values():
                yield from (row for _, row in read_rows(path))

        output = self._path(k, "dataset")
        manifest = write_stage("dataset", output, files, {}, make)
        if not manifest.counts["out"]:
            of_pairs = load_manifest(self._path(k, "pairs"))
            assert of_pairs is not None
            raise ValueError(
                f"iteration {k}: no pair is left to train on; of {of_pairs.counts['in']} rows were left out: "
                f"{_reasons(of_pairs.counts)} (threshold, max_repetition and sampling decide); see "
                f"{self._path(k, 'pairs')}.manifest.json"
            )
        return output

    def _beside(self, output: Path, files: Sequence[Path], scored: bool = False) -> Path:
        """The first responses of several files of the same prompts, side by side in each row.

        If the files are ``scored``, their scores stand side by side too. Rows that one of them lacks (a prompt
        that was too long) are left out; rows are matched by prompt. The other columns, which a scorer may read,
        are the first file's.
        """

        def make(counts: Counter[str]) -> Iterator[Row]:
            streams = [_by_prompt(path) for path in files]
            common = set.intersection(*({key for key, _ in _by_prompt(path)} for path in files))
            matched = [((k, row) for k, row in stream if k in common) for stream in streams]
            for keyed in zip(*matched, strict=True):
                counts["in"] += 1
                if len({key for key, _ in keyed}) != 1:
                    raise ValueError(
                        f"{output}: {', '.join(map(str, files))} differ in their prompts"
                    )
                rows = [row for _, row in keyed]
                made = {name: v for name, v in rows[0].items() if name not in OF_RESPONSES}
                made["responses"] = [read_responses(row, str(output))[0] for row in rows]
                if scored:
                    made["scores"] = [read_scores(row, str(output), 1)[0] for row in rows]
                yield made

        inputs = {f"file {i}": path for i, path in enumerate(files)}
        write_stage("comparison" if scored else "candidates", output, inputs, {}, make)
        return output

    def _fine_tune(self, examples: Path, model: Path, name: str) -> str:
        train_stage(
            "sft", self.config.sft_settings, start=self.models[0],
            dataset=examples, output=model, seed=seed_of(self.config.seed, name) % 2**31,
            launcher=self.config.launcher,
        )  # fmt: skip
        return str(model)

    def _train(self, k: int, dataset: Path) -> str:
        """The checkpoint of iteration k; of a search the best on the held-out prompts."""
        config = self.config
        start = self.models[0] if config.method == "synpo" else self.models[k - 1]
        folder = self.root / f"iteration-{k}"

        def run(settings: dict[str, Any], model: Path) -> str:
            train_stage(
                "train", settings, start=start, dataset=dataset, output=model,
                seed=seed_of(config.seed, k, "train") % 2**31, launcher=config.launcher,
            )  # fmt: skip
            return str(model)

        of_iteration = config.train_settings_of(k)
        search = config.search if isinstance(config.search, dict) else {}
        if not search:
            return run(of_iteration, folder / "model")
        found: list[tuple[float, str, dict[str, Any]]] = []
        for number, values in enumerate(itertools.product(*search.values())):
            chosen = dict(zip(search, values, strict=True))
            trial = folder / f"search-{number}"
            model = run({**of_iteration, **chosen}, trial / "model")
            found.append((self._held_out_value(k, trial, model), model, chosen))
        best = max(found, key=lambda entry: entry[0])
        account = {
            "candidates": [
                # JSON has no −∞: null stands for a model none of whose answers got a score.
                {
                    "settings": settings,
                    "value": value if math.isfinite(value) else None,
                    "model": model,
                }
                for value, model, settings in found
            ],
            "selected": best[1],
        }
        text = json.dumps(account, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "search.json", text.encode())
        return best[1]

    # ---- Evaluation ----

    def _evaluate(self, k: int, model: str) -> None:
        """Responses of iteration k to the held-out prompts, their scores, and those beside earlier models'."""
        config = self.config
        if not config.held_out:
            return
        folder = self.root / f"evaluation/iteration-{k}"
        if k and config.search:
            _copy_stages(Path(model).parent, folder)  # what the search chose by
        responses = self._held_out_responses(folder, model)
        scorer = config.scorer_settings
        if scorer is None:
            return
        if scorer.absolute:
            self._score(folder / "scored.jsonl", responses, k=k)
        for name, other in (("previous", k - 1), ("first", 0)):
            if not k or (name == "first" and k == 1):
                continue
            if scorer.absolute:
                files = [self.root / f"evaluation/iteration-{i}/scored.jsonl" for i in (k, other)]
                self._beside(folder / f"versus-{name}-scored.jsonl", files, scored=True)
            else:
                self._versus(k, folder, name, other)

    def _versus(self, k: int, folder: Path, name: str, other: int) -> Path:
        """Scores of the responses in ``folder`` beside those of iteration ``other``, given to both together."""
        against = self.root / f"evaluation/iteration-{other}/responses.jsonl"
        both = self._beside(folder / f"versus-{name}.jsonl", [folder / "responses.jsonl", against])
        return self._score(folder / f"versus-{name}-scored.jsonl", both, k=k)

    def _held_out_value(self, k: int, folder: Path, model: str) -> float:
        """What a search makes large: the mean score, or of a scorer that compares, its lead over the start."""
        responses = self._held_out_responses(folder, model)
        scorer = self.config.scorer_settings
        assert scorer is not None
        if scorer.absolute:
            scored = self._score(folder / "scored.jsonl", responses, k=k)
            return mean_of(row["scores"][0] for _, row in read_rows(scored))
        scored = self._versus(k, folder, "previous" if k == 1 else "first", 0)
        return mean_of(row["scores"][0] - row["scores"][1] for _, row in read_rows(scored))

    def _held_out_responses(self, folder: Path, model: str) -> Path:
        """All models get the same seed: where two agree they say the same."""
        output = folder / "responses.jsonl"
        sampling = plain(dataclasses.asdict(self.config.eval_sampling_settings))
        self._run(
            "generate",
            GenerateConfig(
                str(self.held_out), str(output), model, self.config.engine, sampling, self.chat,
                self.config.system_prompt, seed_of(self.config.seed, "evaluation"),
            ),
        )  # fmt: skip
        return output

    # ---- Places and processes ----

    def _path(self, k: int, name: str) -> Path:
        return self.root / f"iteration-{k}/{name}.jsonl"

    def _seed(self, k: int, name: str) -> int:
        return seed_of(self.config.seed, k, name)

    def _run(self, command: str, stage: Any) -> None:
        """A stage, here or in a process of its own."""
        if not self.config.isolated:
            _COMMANDS[command](stage)
            return
        values = {k: v for k, v in plain(dataclasses.asdict(stage)).items() if v is not None}
        output = Path(stage.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.with_name(output.name + ".yaml")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_atomically(file, text.encode())
        status = subprocess.run(
            [sys.executable, "-m", "fastpo.cli", command, "--config", str(file)], check=False
        ).returncode
        if status:
            raise ChildProcessError(f"fastpo {command} --config {file} ended with status {status}")


_COMMANDS: dict[str, Any] = {
    "generate": generate,
    "score": score,
    "prompts": make_prompts,
    "improve": improve,
}


def mean_of(values: Iterable[float]) -> float:
    """−∞ of none."""
    held = list(values)
    return statistics.fmean(held) if held else float("-inf")


def _reasons(counts: Mapping[str, int]) -> str:
    """Why rows are left out, with their numbers."""
    return ", ".join(f"{name} {n}" for name, n in counts.items() if n and name not in ("in", "out"))


def _copy_stages(source: Path, target: Path) -> None:
    """Give a directory the finished stages of another one, which are the same there; a kill leaves no half."""
    target.mkdir(parents=True, exist_ok=True)
    for manifest in sorted(source.glob(f"*.jsonl{SUFFIX}")):
        output = target / manifest.name.removesuffix(SUFFIX)
        if not manifest_path(output).is_file():
            write_atomically(output, (source / output.name).read_bytes())
            write_atomically(manifest_path(output), manifest.read_bytes())


def _by_prompt(path: Path) -> Iterator[tuple[int, Row]]:
    for where, row in read_rows(path):
        yield seed_of(read_prompt(row, where)), row
