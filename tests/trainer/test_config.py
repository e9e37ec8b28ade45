"""PreferenceConfig: defaults, refusals that name the field, and the resolved YAML."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from fastpo.losses import LOSSES
from fastpo.trainer import PreferenceConfig, SFTConfig, build_loss
from fastpo.trainer.config import LOSS_FIELDS
from fastpo.trainer.run_config import RunConfig, own_fields, save_config

Settings = Callable[..., PreferenceConfig]
OVERRIDDEN = {
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "logging_nan_inf_filter",
    "bf16",
}


BOTH = pytest.mark.parametrize("config_class", [PreferenceConfig, SFTConfig])


@BOTH
def test_own_fields_collide_with_nothing_of_transformers(config_class: type[RunConfig]) -> None:
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    names = set(own_fields(config_class))
    # Every field is either inherited as it is or fastpo's own.
    assert names >= {f.name for f in dataclasses.fields(config_class)} - inherited
    assert names & inherited == OVERRIDDEN
    assert not [n for n in names - OVERRIDDEN if hasattr(TrainingArguments, n)]


@BOTH
def test_every_own_field_is_in_the_docstring_with_its_default(
    config_class: type[RunConfig],
) -> None:
    for name, f in own_fields(config_class).items():
        assert f"| ``{name}`` | {f.default} | {f.metadata['help']} |" in config_class.__doc__
        assert len(f.metadata["help"]) > 10


def test_command_line_parser_knows_every_field(tmp_path: Path) -> None:
    (config,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--beta", "0.3", "--peft", '{"r": 4}', "--plot_loss"]
    )
    assert (config.beta, config.peft, config.plot_loss) == (0.3, {"r": 4}, True)


def test_defaults(settings: Settings, tmp_path: Path) -> None:
    config = PreferenceConfig(output_dir=str(tmp_path))
    assert (config.loss_type, config.beta, config.margin) == ("dpo", 0.1, "fixed")
    assert config.bf16 is False  # no CUDA here
    assert not config.trust_remote_code
    assert not config.logging_nan_inf_filter
    assert config.needs_reference
    assert not settings(loss_type="simpo").needs_reference


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"beta": -1.0}, "beta: got -1.0"),
        ({"beta": float("nan")}, "beta: got nan"),
        ({"loss_type": "simpoo"}, "loss_type: got 'simpoo', did you mean 'simpo'"),
        ({"loss_type": "orpo", "margin": "gamma"}, "'orpo' takes no dynamic margin"),
        ({"margin": "dynamic"}, "margin: got 'dynamic', expected one of fixed, gamma"),
        ({"margin": "gamma", "gamma_beta_ratio": 0.5, "simpo_gamma": 1.0}, "got both"),
        ({"gamma_beta_ratio": 0.5, "simpo_gamma": 1.0}, "gamma_beta_ratio, simpo_gamma: got both"),
        ({"simpo_gamma": -1.0}, "simpo_gamma: got -1.0"),
        ({"margin": "gamma", "gamma_tau": 0.0}, "^gamma_tau: got"),
        ({"margin": "gamma", "gamma_scope": "epoch"}, "^gamma_scope: got"),
        ({"margin": "gamma", "gamma_solver": "newton"}, "^gamma_solver: got"),
        ({"margin": "gamma", "gamma_queue_size": 0}, "^gamma_queue_size: got"),
        ({"label_smoothing": 0.5}, "label_smoothing: got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing: got -0.1"),
        ({"loss_type": "exo_pair"}, "label_smoothing: got 0, expected a number in"),
        ({"sft_weight": -0.1}, "sft_weight: got -0.1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, expected 0"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter: got True"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef: got -0.1"),
        ({"backward": "fast"}, "backward: got 'fast', expected one of auto, exact, certified"),
        ({"tol": 1.0}, r"tol: got 1.0, expected a number in \[0, 1\)"),
        ({"dtype": "float8"}, "dtype: got 'float8', expected one of auto"),
        ({"max_length": 0}, "max_length: got 0"),
        ({"per_device_train_batch_size": 0}, "^per_device_train_batch_size: got 0"),
        ({"per_device_eval_batch_size": 0}, "^per_device_eval_batch_size: got 0"),
        ({"gradient_accumulation_steps": 0}, "^gradient_accumulation_steps: got 0"),
        (
            {"max_length": 64, "max_prompt_length": 64},
            "max_prompt_length: got 64, expected less than",
        ),
        ({"model_init_kwargs": {"token": "hf_x"}}, "model_init_kwargs: holds a credential"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_bad_settings_are_refused_by_name(
    overrides: dict[str, Any], message: str, settings: Settings
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        settings(**overrides)
    assert "hf_x" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss_kwargs": {"rdpo_alpha": 1.0}}, "rdpo_alpha: not an option of loss 'dpo'"),
        ({"peft": ["q_proj"]}, "peft: got .*expected a mapping"),
    ],
)
def test_bad_types_are_refused(overrides: dict[str, Any], message: str, settings: Settings) -> None:
    with pytest.raises(TypeError, match=message):
        settings(**overrides)


def test_reference_settings_without_a_reference_warn(settings: Settings) -> None:
    with pytest.warns(UserWarning, match="loss 'simpo' uses no reference"):
        settings(loss_type="simpo", precompute_ref_log_probs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(loss_type="dpo", precompute_ref_log_probs=True)


def test_settings_of_gamma_without_it_warn(settings: Settings) -> None:
    with pytest.warns(UserWarning, match="gamma_tau, gamma_scope: no effect with margin 'fixed'"):
        settings(loss_type="simpo", gamma_tau=1.0, gamma_scope="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(loss_type="simpo", gamma_beta_ratio=0.3)  # of plain SimPO too
        settings(loss_type="simpo", margin="gamma", gamma_tau=1.0)


def test_gradient_checkpointing_is_understood_without_a_warning(settings: Settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = settings(gradient_checkpointing=True)
    assert config.gradient_checkpointing
    assert getattr(config, "activation_checkpointing", True)


def test_loss_is_the_one_described(settings: Settings) -> None:
    loss = build_loss(
        settings(
            loss_type="simpo", beta=2.0, gamma_beta_ratio=0.4, margin="gamma", gamma_tau=3.0,
            gamma_scope="batch", gamma_solver="mirror", label_smoothing=0.1, sft_weight=0.2,
        )
    )  # fmt: skip
    assert loss.spec is LOSSES["simpo"]
    assert (loss.beta, loss.gamma0, loss.label_smoothing, loss.sft_weight) == (2.0, 0.8, 0.1, 0.2)
    margin = loss.margin
    assert (margin.tau, margin.scope, margin.solver) == (3.0, "batch", "mirror")
    assert build_loss(settings(loss_type="beta_dpo", loss_kwargs={"a": 0.3})).function.a == 0.3


def test_settings_of_the_loss_are_what_a_checkpoint_records() -> None:
    related = {f.name for f in own_fields(PreferenceConfig).values() if f.name.startswith("gamma")}
    assert related <= set(LOSS_FIELDS)


def test_resolved_settings_make_the_same_run_again(settings: Settings, tmp_path: Path) -> None:
    config = settings(
        loss_type="simpo", beta=2.5, margin="gamma", peft={"r": 8}, lr_scheduler_type="cosine",
        warmup_steps=0.1, gradient_checkpointing=True, eval_strategy="steps", eval_steps=5,
        loss_kwargs={}, report_to="none",
    )  # fmt: skip
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    values = yaml.safe_load(text)
    again = PreferenceConfig(**values)
    left, right = config.to_dict(), again.to_dict()
    assert left == right
    assert text.startswith("# fastpo ")
    assert set(own_fields(PreferenceConfig)) <= set(values)
    assert "per_device_train_batch_size" in values
    assert "adam_beta1" not in values  # as transformers has it


def test_what_was_chosen_for_this_machine_is_not_saved(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(settings(), path)
    values = yaml.safe_load(path.read_text())
    assert values["bf16"] is None
    assert "dataloader_pin_memory" not in values
    save_config(settings(bf16=False, dataloader_pin_memory=False), path)
    values = yaml.safe_load(path.read_text())
    assert (values["bf16"], values["dataloader_pin_memory"]) == (False, False)


def test_resolved_settings_hold_no_credentials(settings: Settings, tmp_path: Path) -> None:
    config = settings(
        hub_token="hf_secret",
        dataset="https://user:hf_secret@host/data.jsonl",
        model_init_kwargs={"quantization_config": {"api_key": "hf_secret", "load_in_4bit": True}},
    )
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text
    values = yaml.safe_load(text)
    assert values["dataset"] == "https://host/data.jsonl"
    assert values["model_init_kwargs"] == {"quantization_config": {"load_in_4bit": True}}


def test_liger_loses_its_own_loss(settings: Settings) -> None:
    config = settings(
        use_liger_kernel=True, liger_kernel_config={"rope": False, "cross_entropy": True}
    )
    assert config.liger_kernel_config == {
        "rope": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    assert settings().liger_kernel_config is None
