"""On which devices a run may go on; DeepSpeed's configuration of a reference; models that are not sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from fastpo.trainer import PreferenceTrainer
from fastpo.trainer.checkpoint import load_run_state
from fastpo.trainer.devices import Devices
from fastpo.trainer.model import add_adapter
from fastpo.trainer.sharded import (
    check_wrapping,
    frozen_copy,
    inference_config,
    place_frozen,
    whole_state,
)

FOUR = Devices(processes=4, sharding="fsdp", micro_batch=8, accumulation=2)


def test_other_numbers_of_processes_with_the_same_micro_steps_may_go_on() -> None:
    for sharding in ("whole", "fsdp"):
        before = asdict(replace(FOUR, sharding=sharding))
        for processes in (1, 2, 4, 8):
            replace(FOUR, sharding=sharding, processes=processes).check_resumption(before, "c")
    FOUR.check_resumption({}, "a checkpoint of an older version")


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (
            {},
            {"sharding": "whole", "processes": 1},
            r"saved by 4 processes with FSDP and cannot be read without sharding; resume it with FSDP",
        ),
        ({"sharding": "whole", "processes": 1}, {}, r"saved by 1 process without sharding and cannot be read"),
        (
            {"sharding": "deepspeed"},
            {"sharding": "deepspeed", "processes": 2},
            r"got 2 processes, expected 4 \(or start from its weights with model_name_or_path\)",
        ),
        (
            {"micro_batch": None},
            {"micro_batch": None, "processes": 2},
            r"tokens_per_batch, .*got 2 processes, expected 4",
        ),
        (
            {"micro_batch": None, "cut": "tokens_per_batch 700, padded, 4 in parallel"},
            {"micro_batch": None, "cut": "tokens_per_batch 700, padded, 2 in parallel"},
            r"with batches of tokens_per_batch 700, padded, 4 in parallel; this run's are of .* 2 in parallel",
        ),
        (
            {},
            {"micro_batch": 4, "readers": 2},
            r"8 rows on all .*set per_device_train_batch_size to 4 and gradient_accumulation_steps to 2",
        ),
        (
            {},
            {"processes": 2, "micro_batch": 4},
            r"8 rows on all processes together, 2 to an optimiser step; this run has 4 and 2 on 2 processes.*"
            r"set per_device_train_batch_size to 4 and gradient_accumulation_steps to 2",
        ),
        ({}, {"accumulation": 4, "micro_batch": 4}, r"gradient_accumulation_steps to 2"),
        ({}, {"processes": 3, "micro_batch": 9}, r"resume it on 4 processes with the same settings"),
        ({"micro_batch": None}, {}, r"resume it on 4 processes with the same settings"),
    ],
)  # fmt: skip
def test_what_would_train_on_other_rows_or_cannot_be_read_is_refused(
    saved: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        replace(FOUR, **now).check_resumption(asdict(replace(FOUR, **saved)), "checkpoint-2")
    assert str(raised.value).startswith("resume_from_checkpoint: checkpoint-2 ")


def test_a_checkpoint_records_its_devices_and_another_batch_is_refused(
    trainer: Callable[..., PreferenceTrainer], tmp_path: Any
) -> None:
    run = trainer(save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    state = load_run_state(tmp_path / "run" / "checkpoint-2")
    assert state.devices == {
        "processes": 1, "sharding": "whole", "micro_batch": 4, "accumulation": 1, "cut": "", "readers": 1,
    }  # fmt: skip
    other = trainer(per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="set per_device_train_batch_size to 4"):
        other.train(resume_from_checkpoint="auto")


def test_the_reference_s_engine_has_no_part_of_the_optimizer_and_nothing_left_open() -> None:
    config = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "train_batch_size": 64,
        "gradient_clipping": 1.0,
    }
    before = copy.deepcopy(config)
    made = inference_config(config)
    assert config == before
    assert made["zero_optimization"] == {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    }
    assert made["bf16"] == {"enabled": True}
    assert not {"optimizer", "scheduler", "train_batch_size", "gradient_clipping"} & set(made)


def accelerator_of(kind: DistributedType, **state: Any) -> Any:
    return SimpleNamespace(
        distributed_type=kind, device=torch.device("cpu"), state=SimpleNamespace(**state)
    )


def test_fsdp1_places_whole_references_unless_a_process_may_lack_the_weights(model: Any) -> None:
    def placed(**plugin: Any) -> Any:
        plugin = {"fsdp_version": 1, "cpu_ram_efficient_loading": False, **plugin}
        kind = DistributedType.FSDP
        return place_frozen(model, accelerator_of(kind, fsdp_plugin=SimpleNamespace(**plugin)))

    assert placed() is model
    with pytest.raises(ValueError, match=r"fsdp_config: got version 1 .*expected version 2"):
        placed(cpu_ram_efficient_loading=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_below_stage_3_the_reference_gets_the_dtype_that_deepspeed_gives_the_policy(
    model: Any, dtype: torch.dtype
) -> None:
    plugin = SimpleNamespace(
        deepspeed_config={"zero_optimization": {"stage": 2}},
        hf_ds_config=SimpleNamespace(dtype=lambda: dtype),
    )
    accelerator = accelerator_of(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    assert place_frozen(model, accelerator) is model
    assert model.dtype == dtype


def test_models_that_are_not_sharded_are_copied_and_written_as_they_are(model: Any) -> None:
    copied = frozen_copy(model)
    assert copied is not model
    state = whole_state(copied, keep=True)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name] is not copied.state_dict()[name]
    assert whole_state(model, keep=False) == {}


def test_checkpoint_wrappers_around_adapters_are_refused(model: Any) -> None:
    plugin = SimpleNamespace(activation_checkpointing=True)
    accelerator = accelerator_of(DistributedType.FSDP, fsdp_plugin=plugin)
    check_wrapping(model, accelerator)
    adapted = add_adapter(model, {"r": 2, "target_modules": ["q_proj"]})
    with pytest.raises(
        ValueError, match=r"fsdp_config: got activation_checkpointing with an adapter"
    ):
        check_wrapping(adapted, accelerator)
    plugin.activation_checkpointing = False
    check_wrapping(adapted, accelerator)


def test_a_policy_that_is_sharded_already_is_not_copied(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpo.trainer.sharded.is_fsdp", lambda _: True)
    with pytest.raises(
        ValueError, match=r"ref_model: got None with a model that is sharded by FSDP2"
    ):
        frozen_copy(model)
