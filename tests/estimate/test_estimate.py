"""What an estimate is made of: parts, sharding, optimizers, checkpointing, refusals, and how it is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import LENGTH, PAIRS, llama
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from fastpo.cli import main
from fastpo.estimate import Estimate, EstimateConfig, estimate
from fastpo.estimate.ledger import ACTIVATIONS, GRADIENTS, OPTIMIZER, PARTS, Ledger
from fastpo.kernels import products_torch

Settings = Callable[..., dict[str, Any]]
SIMPO = {"loss_type": "simpo", "beta": 2.0}


def weight_bytes() -> int:
    model = AutoModelForCausalLM.from_config(llama())
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_the_ledger_knows_what_is_alive() -> None:
    ledger = Ledger(lambda *_: 0)
    with FakeTensorMode(), ledger:
        a = torch.empty(1000)
        view = a[10:].view(2, -1)
        with ledger.charging(OPTIMIZER):
            b = a + 1
        del a
        c = torch.empty(500, dtype=torch.int8)
        ledger.move(b, GRADIENTS)
        del view, b
        d = torch.empty(1)
    columns = [PARTS.index(part) for part in (ACTIVATIONS, OPTIMIZER, GRADIENTS)]
    assert ledger.timeline()[:, columns].tolist() == [
        [4000, 0, 0], [4000, 4000, 0], [4500, 4000, 0], [4500, 0, 4000], [504, 0, 0],
    ]  # fmt: skip
    assert (c.numel(), d.numel()) == (500, 1)


def test_parts_of_a_run(estimated: Callable[..., Estimate]) -> None:
    full = estimated()
    weights = weight_bytes()
    assert full.most["weights"] == full.most["reference model"] == weights
    trained = 4 * full.parameters
    assert full.most["gradients"] == trained
    assert full.most["optimizer"] == pytest.approx(2 * trained, rel=1e-3)
    assert full.total == sum(full.at_peak.values())
    for name, most in full.most.items():
        assert full.at_peak[name] <= most
    for fields in (SIMPO, {"precompute_ref_log_probs": True}, {"ref_logps": "ref.parquet"}):
        assert "reference model" not in estimated(**fields).most


def test_lora_trains_little_and_needs_no_reference(estimated: Callable[..., Estimate]) -> None:
    lora = estimated(peft={"r": 4, "target_modules": ["q_proj"]})
    assert lora.trained == 3 * 4 * (128 + 128)
    assert lora.most["gradients"] == 4 * lora.trained
    assert lora.most["optimizer"] == pytest.approx(8 * lora.trained, rel=0.01)
    assert lora.most["weights"] == weight_bytes() + 4 * lora.trained
    assert "reference model" not in lora.most


def test_checkpoints_in_place_of_activations(settings: Settings) -> None:
    def activations(layers: int, **fields: Any) -> int:
        given = settings(llama(num_hidden_layers=layers), **SIMPO, **fields)
        return estimate(EstimateConfig(**given)).most["activations"]

    plain = activations(6) - activations(2)
    kept = activations(6, gradient_checkpointing=True) - activations(2, gradient_checkpointing=True)
    # Of each layer the hidden states that go into it.
    assert kept == 4 * 2 * PAIRS * LENGTH * 128 * 4
    assert plain > 5 * kept


@pytest.mark.parametrize(
    ("optim", "bytes_per_parameter"),
    [
        ("sgd", 0), ("rmsprop", 4), ("adamw_torch", 8), ("adamw_bnb_8bit", 2 + 8 / 256),
        ("paged_adamw_32bit", 8), ("lion_8bit", 1 + 4 / 256), ("ademamix_8bit", 3 + 12 / 256),
    ],
)  # fmt: skip
def test_state_of_optimizers(
    optim: str, bytes_per_parameter: float, estimated: Callable[..., Estimate]
) -> None:
    run = estimated(optim=optim, **SIMPO)
    # The peak is in the backward, where a step's temporaries are not.
    assert run.at_peak.get("optimizer", 0) == pytest.approx(
        bytes_per_parameter * run.parameters, rel=0.02, abs=100
    )


def test_lists_of_temporaries_on_cuda_alone(estimated: Callable[..., Estimate]) -> None:
    on_cpu, on_cuda = (
        estimated(optim="adamw_torch", use_cpu=use_cpu, bf16=False, **SIMPO)
        for use_cpu in (True, False)
    )
    # There the denominators of all parameters at once, here two tensors like the largest of them.
    assert on_cuda.most["optimizer"] == pytest.approx(12 * on_cuda.parameters, rel=0.01)
    largest = 4 * 2000 * 128
    assert on_cpu.most["optimizer"] == pytest.approx(8 * on_cpu.parameters + 2 * largest, rel=0.01)


def test_sharding_over_devices(estimated: Callable[..., Estimate]) -> None:
    one = estimated(gradient_accumulation_steps=2)
    parts = ("weights", "reference model", "gradients", "optimizer")
    whole = {name: one.most[name] for name in parts}

    def shares(sharding: str, devices: int = 4) -> tuple[Estimate, dict[str, float]]:
        run = estimated(gradient_accumulation_steps=2, devices=devices, sharding=sharding)
        for name in ("activations", "loss layer"):
            assert run.most[name] == one.most[name]
        return run, {name: round(run.most[name] / whole[name], 3) for name in whole}

    ddp, each = shares("none")
    assert each == dict.fromkeys(parts, 1)
    assert ddp.most["gradient buckets"] == one.most["gradients"]
    assert ddp.total == one.total + one.most["gradients"]
    zero2, each = shares("zero2")
    assert each == {"weights": 1, "reference model": 1, "gradients": 0.25, "optimizer": 0.25}
    for sharding in ("zero3", "fsdp"):
        run, each = shares(sharding)
        assert each == dict.fromkeys(parts, 0.25)
        # Embeddings, head and the last norm; two of the three layers.
        model = AutoModelForCausalLM.from_config(llama())
        layers = sum(p.nbytes for layer in model.model.layers[:2] for p in layer.parameters())
        outside = 4 * (2 * 2000 * 128 + 128)
        assert run.most["gathered weights"] == layers + outside
        assert max(run.total, zero2.total) < ddp.total
    assert shares("fsdp", devices=1)[0].total == one.total


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_the_noise_is_cut_over_all_devices(
    sharding: str, estimated: Callable[..., Estimate]
) -> None:
    noise = {"method": "dnpo", "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    one, four = (
        estimated(devices=devices, sharding=sharding, **noise).most["noise generator"]
        for devices in (1, 4)
    )
    weight, bias = 4 * 2000 * 128, 4 * 2000
    generator = weight + bias
    # Its gradient, two moments, and what AdamW makes of the largest parameter in a step.
    assert one == pytest.approx(4 * generator + 2 * weight, rel=0.01)
    assert four == pytest.approx(one / 4 + 2 * generator, rel=0.01)


def test_dtypes_of_a_sharded_run(estimated: Callable[..., Estimate]) -> None:
    """Layers see weights in 16 bits; FSDP keeps them in float32, DeepSpeed a float32 copy in its optimizer."""
    runs = {
        sharding: estimated(devices=2, sharding=sharding, bf16=True, **SIMPO)
        for sharding in ("none", "fsdp", "zero2", "zero3")
    }
    count = runs["none"].parameters
    per_parameter = {
        name: [round(run.most[part] / count, 1) for part in ("weights", "gradients", "optimizer")]
        for name, run in runs.items()
    }
    assert per_parameter == {
        "none": [4, 4, 8], "fsdp": [2, 2, 4], "zero2": [2, 1, 6], "zero3": [1, 1, 6],
    }  # fmt: skip
    # A live reference: whole in the loaded dtype under zero2, else as the policy's weights.
    live = {
        sharding: estimated(devices=2, sharding=sharding, bf16=True).most["reference model"]
        for sharding in runs
    }
    assert {name: round(held / count, 1) for name, held in live.items()} == {
        "none": 4, "fsdp": 2, "zero2": 4, "zero3": 1,
    }  # fmt: skip
    # Autocast's copies of the weights are there without sharding alone.
    saved = runs["none"].most["activations"] - runs["fsdp"].most["activations"]
    assert saved > 1.5 * count


def test_longer_and_larger_batches_need_more(estimated: Callable[..., Estimate]) -> None:
    small = estimated(**SIMPO)
    assert estimated(max_length=2 * LENGTH, **SIMPO).most["activations"] > (
        1.9 * small.most["activations"]
    )
    assert estimated(per_device_train_batch_size=2 * PAIRS, **SIMPO).most["activations"] > (
        1.9 * small.most["activations"]
    )


def test_gathered_weights_are_those_of_the_larger_model(settings: Settings, tmp_path: Path) -> None:
    """Policy and reference take turns."""
    large = llama(hidden_size=256, num_attention_heads=8)
    large.save_pretrained(tmp_path / "large")
    given = settings(llama(), devices=4, sharding="fsdp")
    small, other = (
        estimate(EstimateConfig(**given, **more))
        for more in ({}, {"ref_model_name_or_path": str(tmp_path / "large")})
    )
    assert other.most["gathered weights"] > 1.9 * small.most["gathered weights"]
    assert other.most["weights"] == small.most["weights"]


def test_a_missing_gpu_does_not_matter(settings: Settings) -> None:
    """Unset, bf16 is what a GPU has; told, it is taken without one at hand."""
    given = settings(llama(), **SIMPO) | {"use_cpu": False}
    unset, told = (EstimateConfig(**given, **more) for more in ({}, {"bf16": True, "tf32": True}))
    assert unset.bf16
    assert estimate(unset).total == estimate(told).total
    assert estimate(EstimateConfig(**given, bf16=False)).total != estimate(unset).total


def test_a_gpu_run_is_not_taken_apart_as_on_a_cpu(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty on DNPO's noise: a CPU's library makes its products in thousands of parts."""
    monkeypatch.setattr(products_torch, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products_torch, "_onednn", lambda *_: pytest.fail("made as on a CPU"))
    given = settings(llama(vocab_size=8000, hidden_size=256), method="dnpo") | {"use_cpu": False}
    assert estimate(EstimateConfig(**given)).total > 0
    assert products_torch.onednn_is_faster()


def test_how_the_run_is_spread_is_said_here(settings: Settings) -> None:
    given = settings(llama(), **SIMPO) | {"use_cpu": False}
    one, told, two = (
        estimate(EstimateConfig(**given, **more)).notes
        for more in ({}, {"fsdp": "full_shard"}, {"devices": 2})
    )
    assert one == ["for one device; devices and sharding spread the run over several"]
    assert told[0].startswith("fsdp: without effect here; devices and sharding say")
    assert two == []


# ---- Refusals ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": 0}, "devices: got 0, expected an integer ≥ 1"),
        ({"sharding": "zero1"}, "sharding: got 'zero1', expected one of none, fsdp, zero2, zero3"),
        ({"device_memory": -1.0}, "device_memory: got -1.0"),
        ({"prompt_length": 0}, "prompt_length: got 0, expected an integer ≥ 1"),
        ({"prompt_length": 128}, "prompt_length: got 128, expected less than max_length (128)"),
        (
            {"tokens_per_batch": 20, "prompt_length": 10},
            "tokens_per_batch: got 20, expected at least 22 for a pair whose prompt has 10 tokens",
        ),
        (
            {"prefix_sharing": True, "attn_implementation": "flash_attention_2"},
            "prefix_sharing: got True with attn_implementation 'flash_attention_2'",
        ),
        ({"max_length": None}, "max_length: got None, expected a number of tokens"),
        ({"optim": "galore_adamw"}, "optim: the memory of 'galore_adamw' is not known here"),
        ({"model_init_kwargs": {"load_in_4bit": True}}, "with quantised weights"),
        ({"model_name_or_path": None}, "model_name_or_path: got None, expected a directory"),
        ({"peft": {"rank": 8}}, "peft: LoraConfig has no field 'rank'"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        estimate(EstimateConfig(**settings(llama(), **fields)))


def test_a_directory_without_a_configuration(settings: Settings, tmp_path: Path) -> None:
    given = settings(llama())
    with pytest.raises(FileNotFoundError, match="model_name_or_path: no file or directory"):
        estimate(EstimateConfig(**(given | {"model_name_or_path": str(tmp_path / "none")})))
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        estimate(EstimateConfig(**given))


def test_a_model_whose_work_depends_on_its_numbers(settings: Settings) -> None:
    experts = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32,
    )  # fmt: skip
    fields = {"model_init_kwargs": {"experts_implementation": "eager"}, **SIMPO}
    with pytest.raises(
        ValueError, match="cannot be estimated: what it does depends on the numbers"
    ):
        estimate(EstimateConfig(**settings(experts, **fields)))


# ---- The command ----


@pytest.fixture
def command(settings: Settings, tmp_path: Path) -> Callable[..., int]:
    """Run `fastpo estimate` on the YAML file of a training run."""

    def run(*arguments: str) -> int:
        path = tmp_path / "train.yaml"
        run_settings = settings(llama(), dataset="rows.jsonl", eval_dataset="more.jsonl", beta=0.2)
        path.write_text(yaml.safe_dump(run_settings), encoding="utf-8")
        return main(["estimate", "--config", str(path), *arguments])

    return run


def test_the_table(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--device_memory", "0.01") == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM: 955,264 parameters in float32, 955,264 trained; no autocast" in out
    assert "4 sequences of 128 tokens per device at once; 1 device, sharding none" in out
    rows = {line[:20].strip(): line[20:] for line in out.splitlines() if line.startswith("  ")}
    assert rows["weights"].split() == ["3.64", "MiB", "3.64", "MiB"]
    assert "10.24 MiB  does not fit" in rows["device"]
    assert rows["device"].endswith("short")
    ends = {len(line.split("  does")[0]) for line in out.splitlines() if line.startswith("  ")}
    assert len(ends) == 1
    assert command("--device_memory", "1") == 0
    assert "fits, " in capsys.readouterr().out


def test_json(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--json", "--devices", "2", "--sharding", "fsdp", "--device_memory=16") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["total"] == sum(said["at_peak"].values())
    assert said["fits"] is True
    assert said["device_memory"] == 16 * 2**30
    assert said["notes"] == ["sharded parts are computed from one device's, not measured"]
    assert command("--json", "--prefix_sharing", "--tokens_per_batch", "4096") == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("prefix_sharing: counted for pairs without a prompt to share")
    assert command("--prefix_sharing", "--prompt_length", "100") == 0
    out = capsys.readouterr().out
    assert "4 sequences of 128 tokens per device at once, in 2 rows of 156; 1 device" in out
    assert "prefix_sharing" not in out
    assert command("--json") == 0
    alone = json.loads(capsys.readouterr().out)
    if not torch.cuda.is_available():
        assert (alone["device_memory"], alone["fits"]) == (None, None)


def test_a_mistake_is_one_line(command: Callable[..., int], capsys) -> None:
    assert command("--sharding", "some") == 2
    assert "fastpo estimate: error: sharding: got 'some'" in capsys.readouterr().err
