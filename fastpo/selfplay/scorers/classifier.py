"""Sequence classifiers of transformers: loading them, all weights and nothing made up, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastpo.trainer.model import load_tokenizer_of

from .sequences import Ids, padded, pick_device


class Classifier:
    """A sequence classifier and its tokenizer.

    Args:
        name: checkpoint directory or Hub name.
        dtype, device, trust_remote_code: see :class:`~fastpo.selfplay.scorers.ScorerSettings`.
        max_length: tokens of an input; None: what the model and its tokenizer allow.
        chat_template: Jinja text or a file that holds it; None: the tokenizer's own.
        loader: the class that loads the model; one that is not transformers' own takes no other weights than
            its own.

    Attributes:
        model: in evaluation mode.
        tokenizer: with that chat template.
        max_length: tokens of an input; None: any number.

    Raises:
        ValueError: it cannot be loaded, or the weights are not those of such a model.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str,
        device: str | None,
        trust_remote_code: bool,
        max_length: int | None = None,
        chat_template: str | None = None,
        loader: Any = AutoModelForSequenceClassification,
    ) -> None:
        self.tokenizer = load_tokenizer_of(name, "scorer.model", chat_template, trust_remote_code)
        model = _load(name, loader, {"dtype": dtype, "trust_remote_code": trust_remote_code})
        self.model = model.to(pick_device(device)).eval()
        self._config = model.config.get_text_config()
        self._names_pad = self._config.pad_token_id is not None
        self.max_length = max_length or self._longest_input()

    def logits(self, sequences: Sequence[Ids]) -> Tensor:
        """(n, labels) float32."""
        pad = self._pad_token(sequences)
        logits = self.model(**padded(sequences, pad, self.model.device)).logits
        return logits.float().reshape(len(sequences), -1)

    def _pad_token(self, sequences: Sequence[Ids]) -> int:
        """What fills up, and what the model takes for filling.

        Decoders read their head's output at the last token that is not ``config.pad_token_id``. A checkpoint
        that names one was trained with it. One that names none means the last token, so any id will do that
        does not occur; EOS, the usual stand-in, would hide the EOS of a text.
        """
        if not self._names_pad:
            used = set().union(*sequences)
            self._config.pad_token_id = next(k for k in range(len(used) + 1) if k not in used)
        return self._config.pad_token_id

    def _longest_input(self) -> int | None:
        positions = getattr(self._config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            # RoBERTa and its kin count positions from padding_idx + 1.
            is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
            if is_table and module.padding_idx is not None:
                positions = module.num_embeddings - module.padding_idx - 1
        limits = [n for n in (positions, self.tokenizer.model_max_length) if n is not None]
        longest = min(limits)
        return longest if longest < 1 << 31 else None  # a tokenizer that names none says 10³⁰


def load_config(name: str, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint directory or Hub name.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"scorer.model: no configuration could be loaded from {name}: {error}"
        ) from error


def _load(name: str, loader: Any, arguments: dict[str, Any]) -> Any:
    """The model, after a look at what it was loaded from.

    Weights that the checkpoint does not have are an error: transformers makes them up at random.
    """
    try:
        model, info = loader.from_pretrained(name, output_loading_info=True, **arguments)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"scorer.model: {name} could not be loaded: {error}") from error
    is_ours = loader is not AutoModelForSequenceClassification
    found = {"no": info["missing_keys"], "unknown": info["unexpected_keys"] if is_ours else ()}
    wrong = [f"{what} {', '.join(sorted(keys)[:4])}" for what, keys in found.items() if keys]
    if wrong:
        raise ValueError(
            f"scorer.model: the weights of {name} are not those of a {type(model).__name__}: "
            f"{'; '.join(wrong)}"
        )
    return model
