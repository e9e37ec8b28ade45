"""``LoopConfig``: every setting of ``fastpo iterate``, checked before anything is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engines import EngineSettings, Sampling, make_engine
from .keywords import Keywords, check_corpus
from .pairs import PairsConfig
from .prompt_templates import GENERATOR_TEMPLATE, IMPROVER_TEMPLATE, load_template
from .rows import check_readable
from .scorers import ScorerSettings, make_scorer
from .settings import from_mapping
from .synpo import KEYWORDS
from .training import check_training_settings

METHODS = ("spin", "dnpo", "synpo", "dpo")
# What a method trains with unless ``train`` says otherwise.
TRAIN_DEFAULTS: dict[str, dict[str, Any]] = {
    "spin": {"loss_type": "spin"},
    "dnpo": {"loss_type": "spin", "method": "dnpo"},
    "synpo": {"loss_type": "simpo"},
    "dpo": {"loss_type": "dpo"},
}
MIXED = {"spin": 2, "dnpo": 2, "dpo": 1}  # iterations whose pairs are trained on together
OF_SYNPO = (
    "corpus",
    "prompts_per_iteration",
    "sft",
    "improver_threshold",
    "generator_template",
    "improver_template",
    "stopwords",
)
# Fields that may differ in a run that goes on: how far it goes, where it is computed, and how patiently. What a
# stage's manifest holds (the fields of train and sft, engine.batch_size) is none of them.
MAY_CHANGE = (
    "iterations",
    "launcher",
    "isolate",
    "engine.device",
    "scorer.device",
    "scorer.engine.device",
    "scorer.engine.concurrency",
    "scorer.engine.timeout",
    "scorer.engine.retries",
    "scorer.engine.api_key_env",
)


@dataclass
class LoopConfig:
    """Settings of ``fastpo iterate``."""

    method: str = field(
        metadata={
            "help": "spin (given answer over the model's own), dnpo (the better of both, with trainable "
            "noise), synpo (synthetic prompts and improved answers), dpo (best over worst of several answers)"
        }
    )
    model_name_or_path: str = field(
        metadata={"help": "checkpoint directory or Hub name that the loop starts from"}
    )
    seeds: str = field(
        metadata={
            "help": "JSONL or Parquet of prompt and completion, or messages; method dpo needs prompts alone"
        }
    )
    output_dir: str = field(metadata={"help": "directory of the loop; a second run goes on there"})
    iterations: int = field(default=3, metadata={"help": "≥ 1"})
    held_out: int = field(
        default=256,
        metadata={
            "help": "different seed prompts that are drawn to evaluate every model on and not trained on; "
            "0: none"
        },
    )
    engine: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "transformers or vllm and its settings, as for fastpo generate; without model"
        },
    )
    sampling: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "as for fastpo generate; method dpo needs n ≥ 2"},
    )
    eval_sampling: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "of the held-out prompts; unset: sampling with n 1"}
    )
    scorer: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "as for fastpo score; spin needs none, but then nothing is evaluated by it"
        },
    )
    threshold: float = field(
        default=0.0,
        metadata={"help": "a pair is kept if its scores differ by more (dnpo, synpo, dpo); ≥ 0"},
    )
    max_repetition: float = field(default=1.0, metadata={"help": "as for fastpo pairs; SynPO: 0.5"})
    max_pairs: int | None = field(
        default=None, metadata={"help": "that an iteration adds; unset: all. SynPO: 10000"}
    )
    mix_iterations: int | None = field(
        default=None,
        metadata={
            "help": "the last so many iterations' pairs are trained on; unset: 2 (spin, dnpo), 1 (dpo). "
            "synpo trains on all"
        },
    )
    train: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "fields of fastpo train, without model, dataset and output_dir"},
    )
    train_from: dict[Any, Any] | str | None = field(
        default=None,
        metadata={
            "help": "iteration → fields of train that hold from it on; SPIN: {3: {learning_rate: 1.0e-7}}"
        },
    )
    search: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "fields of train → lists of values: each combination is trained, and the best on the "
            "held-out prompts goes on; SynPO: {beta: [2, 4, 6, 8, 10, 12]}"
        },
    )
    sft: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "synpo: fields of fastpo sft, for prompt generator and improver"},
    )
    corpus: str | None = field(
        default=None,
        metadata={"help": "synpo: text whose paragraphs give keywords; see fastpo prompts"},
    )
    prompts_per_iteration: int | None = field(
        default=None,
        metadata={"help": "synpo: keyword lists drawn in an iteration; paper: 36000 to 72000"},
    )
    improver_threshold: float | None = field(
        default=None,
        metadata={
            "help": "synpo: a seed's answer must be scored better than the model's own by more; unset: "
            "threshold"
        },
    )
    generator_template: str | None = field(
        default=None,
        metadata={"help": "synpo: file of the prompt generator's prompt; unset: fastpo's"},
    )
    improver_template: str | None = field(
        default=None, metadata={"help": "synpo: file of the improver's prompt; unset: fastpo's"}
    )
    stopwords: str | None = field(
        default=None,
        metadata={"help": "synpo: file of words that are no keywords; unset: English ones"},
    )
    chat: bool | None = field(
        default=None,
        metadata={
            "help": "prompts that are text are the user's turn; unset: if the model has a chat template"
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "before conversations that have none"}
    )
    launcher: str | None = field(
        default=None,
        metadata={
            "help": "starts training on several devices, e.g. accelerate launch --num_processes 8; unset: in "
            "this process"
        },
    )
    isolate: bool | None = field(
        default=None,
        metadata={
            "help": "run generation and scoring in processes of their own, which give the GPU back; unset: "
            "with vllm"
        },
    )
    seed: int = field(default=0, metadata={"help": "of everything that is drawn"})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        for name, least in (
            ("iterations", 1),
            ("held_out", 0),
            ("mix_iterations", 1),
            ("prompts_per_iteration", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, expected an integer ≥ {least}")
        PairsConfig(
            "",
            "",
            threshold=self.threshold,
            max_repetition=self.max_repetition,
            max_pairs=self.max_pairs,
        )
        for name in (
            "engine", "sampling", "eval_sampling", "scorer", "train", "train_from", "search", "sft",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected a mapping")
        if self.method == "spin" and self.threshold:
            raise ValueError(
                "threshold: has no effect with method 'spin', which compares no scores"
            )
        self._check_making()
        check_training_settings("train", self.train_settings, "train")
        self._check_train_from()
        self._check_search()
        self._check_synpo()

    def _check_making(self) -> None:
        """Engine, sampling and scorer."""
        if self.engine_settings.kind == "openai":
            raise ValueError(
                "engine.kind: got 'openai', expected transformers or vllm: the loop's models are directories "
                "that a server would have to load in every iteration"
            )
        if self.engine_settings.model is not None:
            raise ValueError("engine.model: the loop sets it")
        of_training = self.sampling_settings
        if self.method == "dpo" and of_training.n < 2:
            raise ValueError(
                f"sampling.n: got {of_training.n}, expected ≥ 2 with method 'dpo', which compares a prompt's "
                "answers"
            )
        if self.method != "dpo" and of_training.n != 1:
            raise ValueError(
                f"sampling.n: got {of_training.n}, expected 1 with method {self.method!r}"
            )
        if self.eval_sampling_settings.n != 1:
            raise ValueError(f"eval_sampling.n: got {self.eval_sampling_settings.n}, expected 1")
        if self.scorer is None and self.method != "spin":
            raise ValueError(
                f"scorer: got None, expected one: method {self.method!r} compares answers"
            )
        self.scorer_settings  # noqa: B018  (it checks)

    def _check_train_from(self) -> None:
        for k, values in (_mapping(self.train_from) or {}).items():
            if not str(k).isdecimal() or int(k) < 1:
                raise ValueError(f"train_from: got {k!r}, expected the number of an iteration, ≥ 1")
            if not isinstance(values, dict):
                raise TypeError(f"train_from.{k}: got {values!r}, expected a mapping")
            varied = sorted(set(values) & set(_mapping(self.search) or {}))
            if varied:
                raise ValueError(f"train_from.{k}.{varied[0]}: has no effect, search varies it")
            check_training_settings("train", self.train_settings_of(int(k)), f"train_from.{k}")

    def _check_search(self) -> None:
        for name, values in (_mapping(self.search) or {}).items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"search.{name}: got {values!r}, expected a list of values")
            for value in values:
                check_training_settings(
                    "train", {**self.train_settings, name: value}, f"search.{name}"
                )
        if self.search and (self.scorer is None or not self.held_out):
            raise ValueError("search: needs a scorer and held_out > 0 to choose by")

    def _check_synpo(self) -> None:
        if self.method != "synpo":
            for name in OF_SYNPO:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: has no effect with method {self.method!r}")
            return
        for name in ("corpus", "prompts_per_iteration"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: got None, expected one with method 'synpo'")
        if self.mix_iterations is not None:
            raise ValueError(
                "mix_iterations: has no effect with method 'synpo', which trains on all pairs"
            )
        check_training_settings("sft", _mapping(self.sft), "sft")

    def check_files(self) -> None:
        """Raise where something that the loop needs cannot be used, before hours are spent on what comes first.

        Opens files, imports a scorer's module, and reads a corpus up to the first paragraph with keywords; no
        weights are loaded.

        Raises:
            FileNotFoundError: a file or model directory that is not there; the field is named.
            ImportError: a scorer's module or function, or a package, that cannot be imported.
            ValueError: a file or model directory that cannot be used.
        """
        check_readable(Path(self.seeds), "seeds")
        for name in ("corpus", "generator_template", "improver_template", "stopwords"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise FileNotFoundError(f"{name}: no file {value!r}")
        try:
            make_engine(self.engine_settings, self.model_name_or_path)
        except (FileNotFoundError, ValueError) as error:
            message = str(error)
            if not message.startswith("model: "):
                raise
            raise type(error)(f"model_name_or_path: {message.removeprefix('model: ')}") from error
        scorer = self.scorer_settings
        if scorer is not None:
            make_scorer(scorer, self.model_name_or_path).close()
        if self.corpus is not None:
            load_template(self.generator_template, GENERATOR_TEMPLATE)
            load_template(self.improver_template, IMPROVER_TEMPLATE)
            stopwords = None if self.stopwords is None else Path(self.stopwords)
            check_corpus(Path(self.corpus), KEYWORDS, Keywords(stopwords))

    @property
    def engine_settings(self) -> EngineSettings:
        return from_mapping(EngineSettings, _mapping(self.engine), "engine")

    @property
    def sampling_settings(self) -> Sampling:
        return from_mapping(Sampling, _mapping(self.sampling), "sampling")

    @property
    def eval_sampling_settings(self) -> Sampling:
        if self.eval_sampling is None:
            values = {**(_mapping(self.sampling) or {}), "n": 1}
            return from_mapping(Sampling, values, "sampling")
        return from_mapping(Sampling, _mapping(self.eval_sampling), "eval_sampling")

    @property
    def scorer_settings(self) -> ScorerSettings | None:
        if self.scorer is None:
            return None
        return from_mapping(ScorerSettings, _mapping(self.scorer), "scorer")

    @property
    def train_settings(self) -> dict[str, Any]:
        """Fields of ``PreferenceConfig``, with the method's defaults."""
        return {
            **TRAIN_DEFAULTS[self.method],
            **self._chat_template,
            **(_mapping(self.train) or {}),
        }

    @property
    def sft_settings(self) -> dict[str, Any]:
        """Fields of ``SFTConfig``."""
        return {**self._chat_template, **(_mapping(self.sft) or {})}

    @property
    def _chat_template(self) -> dict[str, Any]:
        """Training puts conversations into text as generation does, unless it is told otherwise."""
        template = self.engine_settings.chat_template
        return {} if template is None else {"chat_template": template}

    def train_settings_of(self, k: int) -> dict[str, Any]:
        """The same with what ``train_from`` says of iteration ``k``."""
        later = {int(i): values for i, values in (_mapping(self.train_from) or {}).items()}
        settings = self.train_settings
        for i in sorted(i for i in later if i <= k):
            settings.update(later[i])
        return settings

    @property
    def mixed(self) -> int:
        """Iterations whose pairs are trained on together."""
        return MIXED[self.method] if self.mix_iterations is None else self.mix_iterations

    @property
    def isolated(self) -> bool:
        """Whether models are run in processes of their own."""
        return self.engine_settings.kind == "vllm" if self.isolate is None else self.isolate


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None
