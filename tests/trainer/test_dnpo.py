"""method dnpo: a step's noise, both schedules, accumulation, references, σ limit, checkpoints, refusals."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

import fastpo
from fastpo.trainer import PreferenceConfig, PreferenceTrainer, reference
from fastpo.trainer.checkpoint import TENSOR_FILE, find_resume_point, load_run_state
from fastpo.trainer.model import add_adapter
from fastpo.trainer.noise import noise_seed, token_index
from fastpo.trainer.noisy_head import NoisyHead

Runner = Callable[..., PreferenceTrainer]
Settings = Callable[..., PreferenceConfig]

DNPO: dict[str, Any] = {
    "method": "dnpo", "loss_type": "spin", "beta": 0.5, "noise_alpha": 0.2, "noise_sigma_limit": 1e9,
}  # fmt: skip
# For runs that are compared: Adam would turn a difference of 1e-9 in a tiny gradient into one of the rate.
SGD: dict[str, Any] = {**DNPO, "optim": "sgd", "learning_rate": 0.05, "noise_learning_rate": 0.5}


def loud(run: PreferenceTrainer, std: float = 0.05) -> PreferenceTrainer:
    """With noise that is well away from 0 at the start; the same in every run of a test."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.loss_module.noise.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw))
    return run


def logged(run: PreferenceTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def generator_state(run: PreferenceTrainer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in run.loss_module.noise.state_dict().items()}


def assert_equal_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def perturbed(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


# ---- One step ----


def test_first_step_equals_dense_arithmetic(
    trainer: Runner, model: Any, pairs: datasets.Dataset
) -> None:
    """Noise of seed hash(run seed, step) at token row · max_length + position, one unpadded row at a time."""
    frozen, rows = perturbed(model), pairs.select(range(5))
    run = trainer(
        ref_model=frozen, train_dataset=rows, per_device_train_batch_size=5, max_steps=1,
        max_length=50, **SGD,
    )  # fmt: skip
    noise = copy.deepcopy(loud(run).loss_module.noise).double()
    margins, shifts, squares = [], [], []
    for row in rows:
        scores = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            scored = slice(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)

            def score(logits: Tensor, ids: Tensor = ids, scored: slice = scored) -> Tensor:
                logps = logits[scored].log_softmax(-1)
                return logps.gather(1, ids[0, scored.start + 1 :, None]).sum()

            with torch.no_grad():
                reference_out = frozen(input_ids=ids, output_hidden_states=True)
                logits = reference_out.logits[0].double()
                hidden = reference_out.hidden_states[-1][0].double()
                policy = score(model(input_ids=ids).logits[0].double())
            scores[side] = policy - score(logits)
        sigma = hidden @ noise.weight.t() + noise.bias
        position = row["row"] * 50 + torch.arange(len(sigma))
        epsilon = fastpo.philox_normal(
            noise_seed(7, 0), position[:, None], torch.arange(sigma.shape[1])
        )
        shift = score(logits + sigma * epsilon.double()) - score(logits)
        margins.append(0.5 * (scores["chosen"] - scores["rejected"] + shift))
        shifts.append(0.5 * shift)
        squares.append(sigma[scored].square())
    model_loss = -logsigmoid(torch.stack(margins)).mean()
    penalty = torch.cat(squares).mean()
    before = generator_state(run)
    run.train()
    (entry,) = (e for e in run.state.log_history if "loss/model" in e)
    expected = {
        "loss": 0.2 * penalty, "loss/model": model_loss, "loss/noise": 0.2 * penalty - model_loss,
        "noise/penalty": penalty, "noise/sigma_mean": penalty.sqrt(),
        "noise/margin_shift": torch.stack(shifts).mean(),
        "rewards/margins": torch.stack(margins).mean() - torch.stack(shifts).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    # The generator has taken a step of its own clipped gradient, and σ is logged as it is after it.
    gradients = torch.autograd.grad(0.2 * penalty - model_loss, list(noise.parameters()))
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    assert entry["noise/grad_norm"] == pytest.approx(norm, rel=1e-3)
    after = run.loss_module.noise
    for (name, parameter), gradient in zip(after.named_parameters(), gradients, strict=True):
        step = 0.5 * min(1, 1 / norm) * gradient
        torch.testing.assert_close(
            parameter.detach().double(), before[name].double() - step, rtol=1e-3, atol=1e-5
        )
    assert entry["noise/sigma_max"] == pytest.approx(after.sigma_max(run._noise.hidden).item())


def test_noise_is_a_function_of_run_step_row_and_position() -> None:
    seeds = {noise_seed(run, step) for run in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**64 for s in seeds)
    assert noise_seed(7, 3) == noise_seed(7, 3)
    rows = torch.tensor([5, 0])
    positions = torch.arange(3).expand(2, 3)
    assert token_index(rows, positions, 3, 10).tolist() == [[50, 51, 52], [0, 1, 2]]
    first = 5 * 2**32
    assert token_index(rows, positions[:, :2], 2, None).tolist() == [[first, first + 1], [0, 1]]
    with pytest.raises(ValueError, match="max_length: got 10, expected at least 11"):
        token_index(rows, positions, 11, 10)


# ---- Batches and schedules ----


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_noise_does_not_depend_on_batches(
    schedule: str, trainer: Runner, pairs: datasets.Dataset
) -> None:
    """Micro-steps of 2 and of 8 pairs, over a short last window: the same players to rounding."""
    rows = pairs.select(range(13))

    def run(size: int, steps: int) -> PreferenceTrainer:
        made = loud(
            trainer(
                train_dataset=rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                train_sampling_strategy="sequential", noise_schedule=schedule, max_steps=-1,
                num_train_epochs=2, **SGD,
            )
        )  # fmt: skip
        made.train()
        return made

    large, small = run(8, 1), run(2, 4)
    assert large.state.global_step == small.state.global_step == 4
    # A shift is a small difference of large float32 sums, and the gradient of the noise follows it.
    for name in ("loss/model", "noise/margin_shift", "grad_norm", "noise/grad_norm"):
        assert logged(small, name) == pytest.approx(logged(large, name), rel=1e-3, abs=3e-5), name
    for one, other in ((small.model, large.model), (small.loss_module, large.loss_module)):
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(
                parameter, other.get_parameter(name), rtol=0, atol=1e-5, msg=name
            )


class Snapshots(TrainerCallback):
    """Policy and generator after every optimiser step."""

    def __init__(self) -> None:
        self.policy: list[dict[str, Tensor]] = []
        self.noise: list[dict[str, Tensor]] = []

    def attach(self, run: PreferenceTrainer) -> PreferenceTrainer:
        self.run = run
        run.add_callback(self)
        return run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.policy:
            self._take()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take()

    def _take(self) -> None:
        self.policy.append({k: v.clone() for k, v in self.run.model.state_dict().items()})
        self.noise.append(generator_state(self.run))


def moved(states: list[dict[str, Tensor]]) -> list[bool]:
    return [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(states)
    ]


@pytest.mark.parametrize("run_seed", [7, 8])
def test_noise_of_a_step_is_seeded_by_run_and_step(
    run_seed: int, trainer: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    real = NoisyHead.__call__

    def recorded(self: NoisyHead, *args: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return real(self, *args, **options)

    monkeypatch.setattr(NoisyHead, "__call__", recorded)
    trainer(seed=run_seed, max_steps=3, gradient_accumulation_steps=2, **SGD).train()
    assert seeds == [noise_seed(run_seed, step) for step in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_alternating_players_stand_still_while_the_other_plays(optim: str, trainer: Runner) -> None:
    seen = Snapshots()
    run = seen.attach(
        trainer(
            noise_schedule="alternating", noise_steps=2, max_steps=7, weight_decay=0.1,
            **{**SGD, "optim": optim, "learning_rate": 1e-3, "noise_learning_rate": 1e-2},
        )
    )  # fmt: skip
    run.train()
    policy_turns = [False, False, True, False, False, True, False]
    assert moved(seen.policy) == policy_turns
    assert moved(seen.noise) == [not turn for turn in policy_turns]
    assert [norm > 0 for norm in logged(run, "grad_norm")] == policy_turns
    assert [norm > 0 for norm in logged(run, "noise/grad_norm")] == [not t for t in policy_turns]
    for loss, model, noise, turn in zip(
        *(logged(run, n) for n in ("loss", "loss/model", "loss/noise")), policy_turns, strict=True
    ):
        assert loss == pytest.approx(model if turn else noise, rel=1e-5)


def test_joint_players_both_move_in_every_step(trainer: Runner) -> None:
    seen = Snapshots()
    run = loud(seen.attach(trainer(**SGD)))
    run.train()
    assert moved(seen.policy) == moved(seen.noise) == [True] * 4


@pytest.mark.parametrize("margin", ["fixed", "gamma"])
def test_without_noise_it_is_spin(margin: str, trainer: Runner) -> None:
    """σ = 0 and a learning rate that leaves it there: the policy is trained as by SPIN, to the last bit."""
    shared = {name: SGD[name] for name in ("loss_type", "beta", "optim", "learning_rate")}
    if margin == "gamma":
        shared |= {"margin": margin, "gamma_tau": 0.3}
    spin = trainer(**shared)
    silent = loud(trainer(method="dnpo", noise_learning_rate=1e-300, **shared), std=0.0)
    spin.train()
    silent.train()
    assert not any(p.any() for p in silent.loss_module.noise.parameters())
    assert_equal_state(silent.model.state_dict(), spin.model.state_dict())
    assert logged(silent, "loss/model") == logged(spin, "loss")
    assert logged(silent, "rewards/margins") == logged(spin, "rewards/margins")
    assert max(abs(x) for x in logged(silent, "noise/margin_shift")) == 0
    if margin == "gamma":
        assert logged(silent, "gamma/max") == logged(spin, "gamma/max")


def test_evaluation_has_no_noise(trainer: Runner, pairs: datasets.Dataset) -> None:
    rows = pairs.select(range(6))
    run = loud(trainer(eval_dataset=rows, **SGD), std=1.0)
    run.train()
    metrics = run.evaluate()
    policy, spin = copy.deepcopy(run.model), {"loss_type": "spin", "beta": 0.5}
    expected = trainer(policy, eval_dataset=rows, ref_model=run.ref_model, **spin).evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert metrics[name] == expected[name]
    assert not [name for name in metrics if "noise" in name]


# ---- The generator's optimiser ----


def test_learning_rate_of_the_noise_follows_the_schedule(trainer: Runner) -> None:
    rates: list[tuple[float, ...]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            both = (run._noise.optimizer, kwargs["optimizer"])
            rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in both))

    run = trainer(callbacks=[Watch()], lr_scheduler_type="linear", warmup_steps=2, **SGD)
    run.train()
    # After a step the policy's rate is already that of the next one.
    assert [own for own, _ in rates] == pytest.approx([0.0, 0.25, 0.5, 0.25])
    assert [policy for _, policy in rates] == pytest.approx([0.025, 0.05, 0.025, 0.0])


def test_generator_has_no_weight_decay_and_the_optimiser_that_optim_names(trainer: Runner) -> None:
    for optim, kind in (
        ("rmsprop", torch.optim.RMSprop),
        ("sgd", torch.optim.SGD),
        ("adamw_torch", torch.optim.AdamW),
        ("adafactor", torch.optim.AdamW),
    ):
        run = trainer(**{**SGD, "optim": optim, "weight_decay": 0.3})
        assert type(run._noise.optimizer) is kind
        (group,) = run._noise.optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


def test_learning_rate_of_the_noise_beside_an_optimiser_of_ones_own(
    trainer: Runner, model: Any
) -> None:
    policy = torch.optim.SGD(model.parameters(), lr=0.05)
    halved = torch.optim.lr_scheduler.LambdaLR(policy, lambda step: 0.5)
    run = trainer(model, optimizers=(policy, halved), max_steps=1, **{**SGD, "learning_rate": 5e-5})
    run.train()
    assert run._noise.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


# ---- References ----


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences every call of a reference under noise runs."""
    from fastpo.trainer import noisy_head

    seen: list[int] = []
    original = noisy_head.NoisyHead._score

    def count(self: Any, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(hidden))
        return original(self, hidden, *args, **options)

    monkeypatch.setattr(noisy_head.NoisyHead, "_score", count)
    return seen


def test_chosen_log_probs_may_be_precomputed_rejected_ones_are_not(
    trainer: Runner, model: Any, pairs: datasets.Dataset, sequences: list[int]
) -> None:
    frozen = perturbed(model)
    options = {**SGD, "eval_dataset": pairs.select(range(6))}
    live = loud(trainer(ref_model=copy.deepcopy(frozen), **options))
    live.train()
    assert sequences == [8] * 4
    sequences.clear()
    once = loud(trainer(ref_model=copy.deepcopy(frozen), precompute_ref_log_probs=True, **options))
    assert once.ref_model is not None
    once.train()
    assert sequences == [4] * 4  # the rejected half
    for name in ("loss/model", "noise/margin_shift"):
        assert logged(once, name) == pytest.approx(logged(live, name), abs=3e-5)
    assert once.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], abs=3e-5)
    for name in reference.COLUMNS:
        assert name in once.train_dataset.column_names
    with pytest.raises(ValueError, match="ref_model: got None, expected the reference whose log-p"):
        trainer(train_dataset=once.train_dataset, **SGD)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=" ".join)
def test_base_under_an_adapter_is_the_reference(
    targets: list[str], trainer: Runner, model: Any
) -> None:
    base = copy.deepcopy(model)
    adapted = add_adapter(model, {"r": 4, "lora_alpha": 64, "target_modules": targets})
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    other = loud(trainer(copy.deepcopy(adapted), ref_model=base, **SGD))
    run = loud(trainer(adapted, **SGD))
    assert run.ref_model is None
    run.train()
    other.train()
    for name in ("loss/model", "noise/margin_shift", "noise/penalty"):
        assert logged(run, name) == pytest.approx(logged(other, name), rel=1e-4, abs=3e-5), name


def test_dora_on_the_head_is_refused(trainer: Runner, model: Any) -> None:
    adapted = add_adapter(model, {"r": 2, "target_modules": ["lm_head"], "use_dora": True})
    with pytest.raises(ValueError, match=r"method: got 'dnpo', .* not a plain linear layer"):
        trainer(adapted, **DNPO)


def test_bfloat16(trainer: Runner) -> None:
    run = loud(trainer(bf16=True, use_cpu=True, **SGD))
    run.train()
    assert {p.dtype for p in run.loss_module.noise.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in run.loss_module.noise.parameters())
    assert all(math.isfinite(x) and x != 0 for x in logged(run, "noise/margin_shift"))


# ---- σ ----


class Grow(TrainerCallback):
    """Before optimiser step k + 1, σ of one vocabulary entry is 2^k times what it was, elsewhere it is 0."""

    def attach(self, run: PreferenceTrainer, first: float) -> PreferenceTrainer:
        self.noise = run.loss_module.noise
        with torch.no_grad():
            self.noise.weight.zero_()
            self.noise.bias.zero_()[3] = first
        self.first = first
        run.add_callback(self)
        return run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.noise.weight.zero_()
            self.noise.bias.zero_()[3] = self.first * 2**state.global_step


def test_growing_noise_warns_and_stops_at_the_limit(
    trainer: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("fastpo.trainer.noise.logger.warning", said.append)
    limited = {**SGD, "noise_sigma_limit": 4.0, "max_steps": 9}
    run = trainer(save_strategy="steps", save_steps=1, **limited)
    seen = Snapshots()
    seen.attach(run)
    Grow().attach(run, 0.25)
    with pytest.raises(FloatingPointError) as stopped:
        run.train()
    last = tmp_path / "run" / "checkpoint-4"
    assert str(stopped.value) == (
        "training stopped before optimiser step 5: the noise has grown to σ = 4 (root mean square of a "
        "vocabulary entry, in units of logits), noise_sigma_limit is 4; raise noise_alpha or lower "
        f"noise_learning_rate. No weight was changed by it; the last checkpoint is {last}"
    )
    assert said == [
        f"the noise has grown: σ = {sigma} (noise/sigma_peak) in optimiser step {step}, 0.25 at the start; "
        "training stops at noise_sigma_limit = 4"
        for sigma, step in (("0.5", 2), ("1", 3), ("2", 4))
    ]
    assert_equal_state(run.model.state_dict(), seen.policy[-1])
    assert find_resume_point(tmp_path / "run", "auto") == last
    resumed = trainer(**{**SGD, "max_steps": 6})
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 6


def test_bad_gradient_of_the_noise_stops(trainer: Runner) -> None:
    run = trainer(**SGD)
    run.loss_module.noise.bias.register_hook(lambda grad: grad * math.nan)
    before = generator_state(run)
    with pytest.raises(FloatingPointError, match="finite but the noise's gradient's norm is nan"):
        run.train()
    assert_equal_state(generator_state(run), before)


# ---- Checkpoints ----


class Interrupted(Exception):
    pass


class StopAfter(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Interrupted


@pytest.mark.parametrize(
    "options",
    [
        {
            "optim": "adamw_torch",
            "margin": "gamma",
            "gamma_queue_size": 16,
            "gamma_sample_size": 10,
        },
        {"optim": "rmsprop", "noise_schedule": "alternating", "noise_rank": 3, "noise_steps": 2},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
    ids=["joint γ adamw", "alternating rmsprop rank 3", "sgd"],
)
def test_interrupted_run_repeats_the_uninterrupted_one_to_the_last_bit(
    options: dict[str, Any], trainer: Runner, model: Any, tmp_path: Path
) -> None:
    shared: dict[str, Any] = {
        **DNPO, "learning_rate": 1e-3, "noise_learning_rate": 1e-2, "gradient_accumulation_steps": 2,
        "max_steps": 10, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, **options,
    }  # fmt: skip

    def build(name: str, **more: Any) -> PreferenceTrainer:
        return trainer(copy.deepcopy(model), output_dir=str(tmp_path / name), **shared, **more)

    whole = build("whole")
    whole.train()
    broken = build("broken", callbacks=[StopAfter()])
    with pytest.raises(Interrupted):
        broken.train()
    resumed = build("broken")
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 10
    assert_equal_state(resumed.model.state_dict(), whole.model.state_dict())
    assert_equal_state(resumed.loss_module.state_dict(), whole.loss_module.state_dict())
    assert_equal_state(resumed._noise.state(), whole._noise.state())
    kept = ("loss", "loss/noise", "noise/sigma_max", "noise/margin_shift", "noise/grad_norm")
    for name in kept:
        assert logged(resumed, name) == logged(whole, name), name


@pytest.fixture
def finished(trainer: Runner, tmp_path: Path) -> Path:
    """The checkpoint at step 2 of a run of 2 steps."""
    trainer(**{**DNPO, "max_steps": 2}, save_strategy="steps", save_steps=2).train()
    return tmp_path / "run" / "checkpoint-2"


def test_generator_is_in_the_checkpoint_and_not_in_the_exported_model(
    trainer: Runner, model: Any, tmp_path: Path, finished: Path
) -> None:
    names = set(load_run_state(finished).tensors)
    assert names == {
        "noise.weight", "noise.bias",
        *(f"noise_optimizer.{p}.{k}" for p in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")),
    }  # fmt: skip
    assert set(load_file(finished / TENSOR_FILE)) == names
    run = trainer(**DNPO)
    run.save_model(str(tmp_path / "exported"))
    (weights,) = (tmp_path / "exported").glob("*.safetensors")
    assert not [name for name in load_file(weights) if "noise" in name]
    assert not [p for p in (tmp_path / "exported").iterdir() if "noise" in p.name]


def test_checkpoints_that_do_not_fit_are_refused(
    trainer: Runner, tmp_path: Path, finished: Path
) -> None:
    def resume(**options: Any) -> None:
        made = trainer(**{**DNPO, **options}, output_dir=str(tmp_path / "elsewhere"))
        made.train(resume_from_checkpoint=str(finished))

    for options, message in (
        ({"noise_rank": 3}, "rank: got 3, expected None, that of the noise generator in"),
        ({"noise_alpha": 0.5}, r"another loss \(noise_alpha 0.2 → 0.5\)"),
        ({"noise_schedule": "alternating"}, r"another loss \(noise_schedule 'joint' → 'alternating'\)"),
        ({"margin": "gamma"}, r"another loss \(margin 'fixed' → 'gamma'\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            resume(**options)
    spin = trainer(loss_type="spin", beta=0.5, output_dir=str(tmp_path / "back"))
    with pytest.raises(ValueError, match=r"another loss \(method 'dnpo' → 'preference'"):
        spin.train(resume_from_checkpoint=str(finished))


def test_checkpoint_without_the_generator_is_refused(trainer: Runner, tmp_path: Path) -> None:
    trainer(loss_type="spin", beta=0.5, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    run = trainer(**DNPO, output_dir=str(tmp_path / "dnpo"))
    with pytest.raises(ValueError, match="checkpoint-4 holds no noise generator: it was not saved"):
        run.train(resume_from_checkpoint=str(checkpoint))


# ---- Settings ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "npo"}, "method: got 'npo', expected one of preference, dnpo"),
        ({"noise_schedule": "both"}, "noise_schedule: got 'both', expected one of joint, alternating"),
        ({"noise_alpha": -0.1}, "noise_alpha: got -0.1, expected a finite number ≥ 0"),
        ({"noise_alpha": math.inf}, "noise_alpha: got inf"),
        ({"noise_rank": 0}, "noise_rank: got 0, expected an integer ≥ 1"),
        ({"noise_steps": 0, "noise_schedule": "alternating"}, "noise_steps: got 0, expected an integer ≥ 1"),
        ({"noise_alpha": "0.1"}, "noise_alpha: got '0.1', expected a finite number ≥ 0"),
        ({"noise_rank": True}, "noise_rank: got True, expected an integer ≥ 1"),
        ({"noise_learning_rate": 0.0}, "noise_learning_rate: got 0.0, expected a finite number > 0"),
        ({"noise_learning_rate": "1e-4"}, "noise_learning_rate: got '1e-4', expected a finite number"),
        ({"noise_learning_rate": math.inf}, "noise_learning_rate: got inf, expected a finite number"),
        ({"noise_sigma_limit": -1.0}, "noise_sigma_limit: got -1.0, expected a number > 0"),
        ({"loss_type": "simpo"}, "loss_type, method: loss 'simpo' has no reference to put noise into"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)  # fmt: skip
def test_bad_settings_are_refused_by_name(
    overrides: dict[str, Any], message: str, settings: Settings
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        settings(**{**DNPO, **overrides})


def test_fp16_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**DNPO)
    config.fp16 = True  # on a CPU transformers refuses it first
    with pytest.raises(ValueError, match=r"^fp16: got True, expected False with method 'dnpo'"):
        config._check()


def test_settings_without_effect_warn(settings: Settings) -> None:
    with pytest.warns(UserWarning, match="noise_alpha, noise_steps: no effect with method 'pref"):
        settings(noise_steps=3, noise_alpha=0.5)
    with pytest.warns(UserWarning, match="noise_steps: no effect with noise_schedule 'joint'"):
        settings(noise_steps=3, **DNPO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(noise_steps=3, noise_schedule="alternating", **DNPO)


def test_settings_of_the_noise_are_recorded_in_a_checkpoint() -> None:
    from fastpo.trainer.config import LOSS_FIELDS
    from fastpo.trainer.noise_settings import NOISE_FIELDS

    changeable = {"noise_learning_rate", "noise_sigma_limit"}
    assert set(NOISE_FIELDS) - changeable <= set(LOSS_FIELDS)
    assert "method" in LOSS_FIELDS
