"""The losses against TRL's own trainers, run on a tiny model: its loss, gradients and metrics, on the CPU.

TRL's side is its trainers' real code path, from a data set to the scalar loss (``DPOTrainer.compute_loss``,
CPO's and ORPO's ``get_batch_loss_metrics``). Ours starts from the hidden states and the LM head of the same
model.
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpo.losses import PreferenceLoss
from fastpo.ops.linear_logprobs import shift_labels

pytest.importorskip("trl")
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning"
)  # transformers renames its own fields
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
PAIRS, WORDS = 5, 20

# Name → label smoothing, which TRL 1.16 uses in exo_pair, robust, aot and aot_unpaired alone.
DPO_LOSSES = {
    "sigmoid": 0.0,
    "hinge": 0.0,
    "ipo": 0.0,
    "exo_pair": 1e-2,
    "nca_pair": 0.0,
    "robust": 0.1,
    "bco_pair": 0.0,
    "sppo_hard": 0.0,
    "aot": 0.1,
    "aot_unpaired": 0.1,
    "apo_zero": 0.0,
    "apo_down": 0.0,
    "discopop": 0.0,
    "sft": 0.0,
    "sigmoid_norm": 0.0,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from uniform, so that no term of a loss is near zero
    )
    return LlamaForCausalLM(config)


def trainer_of(trainer_class, config_class, tokenizer, tmp_path, seed, **kwargs):
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return "".join(f" w{draw.randrange(WORDS)}" for _ in range(draw.randint(least, most)))

    rows = [
        {"prompt": words(1, 4)[1:], "chosen": words(1, 9), "rejected": words(1, 9)}
        for _ in range(PAIRS)
    ]
    args = config_class(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=PAIRS,
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=tiny_model(seed),
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        **kwargs,
    )
    trainer.model.eval()  # no gradient checkpointing; there is no dropout to switch off
    return trainer, next(iter(trainer.get_train_dataloader()))


@pytest.fixture
def dpo(tokenizer, tmp_path, seed):
    """TRL's DPO trainer with one batch of pairs."""
    return trainer_of(
        DPOTrainer, DPOConfig, tokenizer, tmp_path, seed, ref_model=tiny_model(seed + 1)
    )


def assert_same_gradients(
    model: torch.nn.Module, ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5
) -> None:
    """The gradients of all parameters, in the norm of the whole vector."""
    got, expected = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (ours, theirs)
    )
    error = (got - expected).norm() / expected.norm().clamp(min=1e-3)
    assert error < bound, f"relative error of the gradient {error:.1e}"


def hidden_states(model, input_ids, attention_mask) -> torch.Tensor:
    return model.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def ours_on(model, batch, loss_fn, ref_model=None):
    labels = shift_labels(batch["input_ids"], batch["completion_mask"])
    inputs = (batch["input_ids"], batch["attention_mask"])
    reference = {}
    if ref_model is not None:
        reference = {
            "ref_hidden": hidden_states(ref_model, *inputs).detach(),
            "ref_weight": ref_model.lm_head.weight,
        }
    return loss_fn(hidden_states(model, *inputs), model.lm_head.weight, labels, **reference)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo_losses(loss_type, beta, dpo):
    trainer, batch = dpo
    smoothing = DPO_LOSSES[loss_type]
    trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss_type], beta, smoothing
    theirs = trainer.compute_loss(trainer.model, batch)
    loss_fn = PreferenceLoss(loss_type, beta=beta, label_smoothing=smoothing)
    ours = ours_on(trainer.model, batch, loss_fn, trainer.ref_model)
    torch.testing.assert_close(ours.loss, theirs, **TOLERANCE)
    # discopop's gradient changes by 1/τ = 20 per nat, and so does the rounding of TRL's float32 sums.
    bound = 1e-5 / 0.05 if loss_type == "discopop" else 1e-5
    assert_same_gradients(trainer.model, ours.loss, theirs, bound)


def test_dpo_metrics(dpo):
    trainer, batch = dpo
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    ours = ours_on(
        trainer.model, batch, PreferenceLoss("dpo", beta=0.1), trainer.ref_model
    ).metrics()
    assert (
        theirs.pop("num_tokens") == batch["attention_mask"].sum()
    )  # all input tokens, a running total
    assert ours.pop("num_tokens") == batch["completion_mask"].sum()  # labelled tokens of this batch
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def cpo_batch(batch):
    """TRL's CPO and ORPO batches, padded apart, as one half-and-half batch."""
    width = max(batch[f"{half}_input_ids"].shape[1] for half in ("chosen", "rejected"))

    def both(key: str, fill: int) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
                for values in (batch[f"chosen_{key}"], batch[f"rejected_{key}"])
            ]
        )

    return {
        "input_ids": both("input_ids", 0),
        "attention_mask": both("attention_mask", 0),
        "completion_mask": both("labels", -100) != -100,
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["cpo", "simpo"])
def test_cpo_and_simpo(loss_type, smoothing, tokenizer, tmp_path, seed):
    trainer, batch = trainer_of(CPOTrainer, CPOConfig, tokenizer, tmp_path, seed)
    trainer.loss_type = "sigmoid" if loss_type == "cpo" else "simpo"
    trainer.beta, trainer.simpo_gamma, trainer.label_smoothing = 1.5, 0.6, smoothing
    theirs, their_metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    options = {"simpo_gamma": 0.6} if loss_type == "simpo" else {}
    loss_fn = PreferenceLoss(
        loss_type, beta=1.5, label_smoothing=smoothing, sft_weight=trainer.cpo_alpha, **options
    )
    ours = ours_on(trainer.model, cpo_batch(batch), loss_fn)
    torch.testing.assert_close(ours.loss, theirs, **TOLERANCE)
    assert_same_gradients(trainer.model, ours.loss, theirs)
    got = ours.metrics()
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "nll_loss",
    ):
        assert got[name] == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-5)


def test_orpo_odds_ratio_term(tokenizer, tmp_path, seed):
    """TRL's loss is NLL + odds-ratio term; its NLL also covers the prompt, so it is taken off."""
    trainer, batch = trainer_of(ORPOTrainer, ORPOConfig, tokenizer, tmp_path, seed)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    ours = ours_on(
        trainer.model, cpo_batch(batch), PreferenceLoss("orpo", beta=trainer.beta, sft_weight=0.0)
    )
    assert ours.loss.item() == pytest.approx(loss.item() - metrics["nll_loss"], rel=1e-5, abs=1e-5)
    got = ours.metrics()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert got[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5)


def test_default_sft_weights():
    cpo_alpha = CPOConfig.__dataclass_fields__["cpo_alpha"].default
    assert PreferenceLoss("cpo").sft_weight == cpo_alpha == 1.0
    assert PreferenceLoss("orpo").sft_weight == 1.0
    assert PreferenceLoss("simpo").sft_weight == 0.0
