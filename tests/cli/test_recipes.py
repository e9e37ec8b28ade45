"""Every recipe parses, and says what its source published."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpo.cli import main
from fastpo.cli.configuration import load_config
from fastpo.trainer import PreferenceConfig

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA, MISTRAL = "llama-3-8b-instruct", "mistral-7b-instruct"
GEMMA, QWEN = "gemma-2-9b-it", "qwen2.5-7b-instruct"

# β, γ/β, τ, learning rate. γ-SimPO: Sun et al., arXiv 2506.03690. SimPO and DPO: Meng et al., arXiv 2405.14734;
# of Qwen2.5, which they do not have, the former's with a fixed margin and those of DPO on zephyr-7b.
PUBLISHED = {
    (LLAMA, "gamma-simpo"): (10, 0.4, 10, 1e-6),
    (MISTRAL, "gamma-simpo"): (2.5, 0.15, 10, 6e-7),
    (GEMMA, "gamma-simpo"): (10, 0.5, 20, 8e-7),
    (QWEN, "gamma-simpo"): (10, 0.3, 3, 1e-6),
    (LLAMA, "simpo"): (10, 0.3, None, 1e-6),
    (MISTRAL, "simpo"): (2.5, 0.1, None, 5e-7),
    (GEMMA, "simpo"): (10, 0.5, None, 8e-7),
    (QWEN, "simpo"): (10, 0.3, None, 1e-6),
    (LLAMA, "dpo"): (0.01, None, None, 3e-7),
    (MISTRAL, "dpo"): (0.01, None, None, 5e-7),
    (GEMMA, "dpo"): (0.01, None, None, 5e-7),
    (QWEN, "dpo"): (0.01, None, None, 5e-7),
}
MODELS = {
    LLAMA: "meta-llama/Meta-Llama-3-8B-Instruct",
    MISTRAL: "mistralai/Mistral-7B-Instruct-v0.2",
    GEMMA: "google/gemma-2-9b-it",
    QWEN: "Qwen/Qwen2.5-7B-Instruct",
}


def test_there_is_one_recipe_per_model_and_method() -> None:
    methods = ("dpo", "simpo", "gamma-dpo", "gamma-simpo")
    expected = {f"{model}-{method}.yaml" for model in MODELS for method in methods}
    others = {"cpu-gamma-simpo.yaml", "cpu-dnpo.yaml", "zephyr-7b-dnpo.yaml"}
    assert {path.name for path in RECIPES.glob("*.yaml")} == expected | others


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_parses_and_names_its_method(path: Path) -> None:
    config = load_config(PreferenceConfig, path)
    method = path.stem.split("-")[-1]
    assert config.loss_type == ("spin" if method == "dnpo" else method)
    assert config.method == ("dnpo" if method == "dnpo" else "preference")
    assert config.margin == ("gamma" if "gamma" in path.stem else "fixed")
    assert config.output_dir == f"runs/{path.stem}"
    assert config.plot_loss


@pytest.mark.parametrize(("model", "method"), PUBLISHED, ids="-".join)
def test_published_settings(model: str, method: str) -> None:
    path = RECIPES / f"{model}-{method}.yaml"
    config = load_config(PreferenceConfig, path)
    beta, ratio, tau, learning_rate = PUBLISHED[model, method]
    assert config.model_name_or_path == MODELS[model]
    assert (config.beta, config.gamma_beta_ratio) == (beta, ratio)
    assert config.learning_rate == pytest.approx(learning_rate, rel=1e-12)
    if tau is not None:
        assert config.gamma_tau == tau
    assert (config.gamma_queue_size, config.gamma_sample_size) == (2048, 256)
    _check_schedule(model, method)


@pytest.mark.parametrize("model", MODELS)
def test_gamma_dpo_is_dpo_with_a_dynamic_margin(model: str) -> None:
    dynamic = load_config(PreferenceConfig, RECIPES / f"{model}-gamma-dpo.yaml")
    fixed = load_config(PreferenceConfig, RECIPES / f"{model}-dpo.yaml")
    for name in ("model_name_or_path", "dataset", "loss_type", "beta", "learning_rate"):
        assert getattr(dynamic, name) == getattr(fixed, name)
    _check_schedule(model, "gamma-dpo")


def _check_schedule(model: str, method: str) -> None:
    """METHODS' common settings; the number of devices that makes a batch of 128 stands in the comment."""
    path = RECIPES / f"{model}-{method}.yaml"
    config = load_config(PreferenceConfig, path)
    assert (config.max_length, config.max_prompt_length) == (2048, 1800)
    assert (config.num_train_epochs, config.warmup_steps) == (1, 0.1)
    assert config.lr_scheduler_type == "cosine"
    assert config.optim == "adamw_torch"
    each, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    devices = 128 // (each * steps)
    assert each * steps * devices == 128
    line = f"# Batch 128 = {each} (pairs per device) x {steps} (micro-steps) x {devices} (devices)"
    assert line in path.read_text(encoding="utf-8")


def test_dnpo_has_the_settings_of_spin() -> None:
    """Chen et al., arXiv 2401.01335: λ, learning rate, optimiser, batch; DNPO names none of its own."""
    path = RECIPES / "zephyr-7b-dnpo.yaml"
    config = load_config(PreferenceConfig, path)
    assert config.model_name_or_path == "alignment-handbook/zephyr-7b-sft-full"
    assert (config.beta, config.optim, config.warmup_steps) == (0.1, "rmsprop", 0.1)
    assert config.learning_rate == pytest.approx(5e-7, rel=1e-12)
    each, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert each * steps * 8 == 64
    line = f"# Batch 64 = {each} (pairs per device) x {steps} (micro-steps) x 8 (devices)"
    assert line in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cpu-gamma-simpo", "cpu-dnpo"])
def test_a_cpu_recipe_runs_on_what_the_demo_prepares(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES / f"{name}.yaml"
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if line.startswith("#   fastpo "):  # the two commands that its head names
            argv = line.removeprefix("#   fastpo ").replace("recipes/", f"{RECIPES}/").split()
            argv += ["--scale", "0.02"] if argv[0] == "demo" else ["--max_steps", "2"]
            assert main(argv) == 0
    assert Path(f"runs/{name}/model.safetensors").is_file()
    assert Path(f"runs/{name}/training.png").is_file()
