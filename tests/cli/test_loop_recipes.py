"""Every recipe of ``fastpo iterate`` parses, says what its source published, and the CPU ones run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpo.cli import main
from fastpo.cli.configuration import load_config
from fastpo.selfplay import synpo
from fastpo.selfplay.loop_config import METHODS, LoopConfig

RECIPES = Path(__file__).parents[2] / "recipes/loops"
PUBLISHED = ("zephyr-7b-spin", "zephyr-7b-dnpo", "mistral-7b-synpo", "llama-3-8b-synpo")
BASES = {
    "mistral-7b-synpo": "alignment-handbook/zephyr-7b-sft-full",
    "llama-3-8b-synpo": "princeton-nlp/Llama-3-Base-8B-SFT",
}


def load(name: str) -> LoopConfig:
    return load_config(LoopConfig, RECIPES / f"{name}.yaml", [], "iterate")


def test_there_is_one_for_a_cpu_per_method_and_those_that_were_published() -> None:
    expected = {f"cpu-{method}" for method in METHODS} | set(PUBLISHED)
    assert {path.stem for path in RECIPES.iterdir()} == expected


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_parses_and_names_its_method(path: Path) -> None:
    config = load(path.stem)
    assert config.method == path.stem.split("-")[-1]
    assert config.output_dir == f"runs/loops/{path.stem}"
    text = path.read_text(encoding="utf-8")
    assert f"#   fastpo iterate --config recipes/loops/{path.name}" in text
    # A kill costs at most the steps since the last save.
    trainings = [config.train_settings] + ([config.sft] if config.method == "synpo" else [])
    assert all(t["save_strategy"] == "steps" and t["save_steps"] <= 200 for t in trainings)


def test_published_settings_of_spin() -> None:
    """Chen et al., arXiv 2401.01335: λ, learning rates, optimiser, batch, draws, iterations mixed."""
    config = load("zephyr-7b-spin")
    first, late = config.train_settings_of(2), config.train_settings_of(3)
    assert config.model_name_or_path == "alignment-handbook/zephyr-7b-sft-full"
    assert (first["beta"], first["optim"], first["num_train_epochs"]) == (0.1, "rmsprop", 2)
    assert (first["learning_rate"], late["learning_rate"]) == (5e-7, 1e-7)
    assert (config.sampling_settings.temperature, config.sampling_settings.max_tokens) == (1, 256)
    assert config.mixed == 2
    assert _batch(first) == 64


def test_published_settings_of_dnpo() -> None:
    """Yang et al., arXiv 2502.05400: three iterations, an evaluator that labels, SPIN's training otherwise."""
    config, spin = load("zephyr-7b-dnpo"), load("zephyr-7b-spin")
    assert (config.iterations, config.mixed) == (3, 2)
    assert config.model_name_or_path == spin.model_name_or_path
    assert config.scorer_settings.model == "llm-blender/PairRM-hf"
    own = {"method", "noise_schedule", "noise_alpha", "noise_learning_rate", "noise_sigma_limit"}
    assert {k: v for k, v in config.train_settings.items() if k not in own} == spin.train_settings


@pytest.mark.parametrize("name", BASES)
def test_published_settings_of_synpo(name: str) -> None:
    """Dong et al., arXiv 2410.06961."""
    config = load(name)
    assert config.model_name_or_path == BASES[name]
    assert (config.iterations, config.max_pairs, config.max_repetition) == (4, 10_000, 0.5)
    assert (config.threshold, config.scorer_settings.kind) == (0.2, "ranker")
    assert 36_000 <= config.prompts_per_iteration <= 72_000
    assert config.sampling_settings.temperature == 0.7
    assert config.search == {"beta": [2, 4, 6, 8, 10, 12]}
    assert config.train_settings["simpo_gamma"] == 1.6
    assert (config.sft["learning_rate"], config.sft["num_train_epochs"]) == (1e-6, 3)
    assert (config.sft["warmup_steps"], config.sft["max_length"], _batch(config.sft)) == (
        0.1,
        8000,
        32,
    )


def _batch(training: dict) -> int:
    """On the eight devices that the head of a recipe names."""
    return 8 * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]


@pytest.mark.parametrize("method", METHODS)
def test_a_cpu_recipe_runs_on_what_the_demo_prepares(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES / f"cpu-{method}.yaml"
    small = ["--iterations", "1", "--held_out", "8", "--threshold", "0", "--train.max_steps", "2"]
    small += ["--scorer.function", "rules:score", "--sampling.temperature", "1.5"]
    if method == "synpo":
        # The generator has no time to learn its tags here.
        monkeypatch.setattr(synpo, "parse_generated", lambda text: (f"order {text.strip()}", ""))
        small += ["--sft.max_steps", "3", "--prompts_per_iteration", "60", "--max_repetition", "1"]
    # The start has hardly been trained at this scale; the true score would be 0 throughout.
    Path("rules.py").write_text("def score(prompt, response, row):\n    return len(response) % 7\n")
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if line.startswith("#   fastpo "):  # the two commands that its head names
            argv = (
                line.removeprefix("#   fastpo ").replace("recipes/", f"{RECIPES.parent}/").split()
            )
            argv += ["--scale", "0.02"] if argv[0] == "demo" else small
            assert main(argv) == 0
    assert Path(f"runs/loops/cpu-{method}/iteration-1/model/model.safetensors").is_file()
    assert Path(f"runs/loops/cpu-{method}/report.md").is_file()
