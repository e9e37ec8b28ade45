"""``ReferencedTrainer``: where a run's reference log-probs come from.

From a frozen model or a base without its adapter at every step, from either once before training, or from a
file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from fastpo.losses import PreferenceLoss
from fastpo.rank_watch import watch_ranks

from . import reference
from .config import PreferenceConfig
from .layout import Layout
from .model import is_peft_model
from .noise import NoisePlayer
from .reference_file import Origin, read_reference_file, with_file_logps
from .resumable import ResumableTrainer
from .sharded import is_sharded, place_frozen, whole_by_module

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel


class ReferencedTrainer(ResumableTrainer):
    """A trainer on pairs whose loss may compare with a reference; a subclass sets the attributes.

    Attributes:
        layout: how batches lie in memory.
        loss_module: whose loss it is.
        ref_model: the frozen reference, as it runs; None where there is none beside the policy.
    """

    args: PreferenceConfig
    train_dataset: datasets.Dataset | None
    eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None
    layout: Layout
    loss_module: PreferenceLoss
    ref_model: Any
    _noise: NoisePlayer | None

    def _around(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in the place of a model."""
        return model

    def _lacks_reference(self) -> bool:
        """Whether the loss needs reference log-probs that not all data sets hold."""
        rows = self._datasets().values()
        given = rows and all(set(reference.COLUMNS) <= set(each.column_names) for each in rows)
        return self.loss_module.spec.needs_reference and not given

    def _datasets(self) -> dict[str, datasets.Dataset]:
        """All data sets by name; None is left out."""
        evaluation = self.eval_dataset
        several = evaluation if isinstance(evaluation, Mapping) else {"eval": evaluation}
        named = {"train": self.train_dataset, **several}
        return {name: rows for name, rows in named.items() if rows is not None}

    def _reference_logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(2B,) float64."""
        if self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                f"loss {self.args.loss_type!r} needs reference log-probs, which this data set lacks "
                "(they were precomputed for the others)"
            )
        if self.ref_model is not None:
            return self._logps_under(self.ref_model, batch)
        with reference.base_model(self.model):
            return self._logps_under(self.model, batch)

    def _logps_under(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(2B,) float64."""
        with self.accelerator.autocast():
            return reference.reference_logps(self._around(model), self.layout.inputs(model, batch))

    @watch_ranks()
    def _precompute_reference(self) -> None:
        """Add the reference's log-probs to all data sets, and let go of its model unless noise needs it."""
        self._check_agreement()
        model, policy = self.ref_model, self.model
        policy.eval()
        if model is None:
            # The policy, which is not trained yet. Where it waits to be sharded it is not on its device.
            waits = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if waits and not is_sharded(policy):
                copied = copy.deepcopy(policy)
                self.layout.add_copy(copied)
                model = place_frozen(copied, self.accelerator)
            else:
                model = policy
        adapted = self.ref_model is None and is_peft_model(policy)

        def logps(batch: Mapping[str, Tensor]) -> Tensor:
            with (
                whole_by_module(model) if model is policy else nullcontext(),
                reference.base_model(model) if adapted else nullcontext(),
            ):
                return self._logps_under(model, batch)

        reference_hash = reference.model_hash(getattr(model, "module", model))
        completed = {
            name: rows
            if set(reference.COLUMNS) <= set(rows.column_names)
            else reference.with_reference_logps(
                rows,
                logps,
                reference_hash=reference_hash,
                precision=self.accelerator.mixed_precision,
                collator=self.data_collator,
                batch_size=self.args.per_device_eval_batch_size,
                accelerator=self.accelerator,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
            for name, rows in self._datasets().items()
        }
        if self._noise is None:
            self.ref_model = None
        self._take_datasets(completed)

    def _take_datasets(self, named: dict[str, datasets.Dataset]) -> None:
        """Put these in the place of what :meth:`_datasets` gave."""
        self.train_dataset = named.pop("train", None)
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = named
        else:
            self.eval_dataset = named.get("eval")

    def _read_reference(self, path: str, model: PreTrainedModel) -> None:
        """Add the log-probs of a file to all data sets; ``model`` is the reference that they must be of."""
        file = read_reference_file(path)
        made = file.origin
        precision = self.accelerator.mixed_precision
        found: list[str | None] = [None]
        if is_sharded(model) or self.is_world_process_zero():
            # Of a model that is not sharded the main process may be the only one to have the weights yet.
            found = [reference.model_hash(model)]
        if self.accelerator.num_processes > 1:
            found = broadcast_object_list(found)
        if found[0] != made.model_hash:
            raise ValueError(
                f"ref_logps: {path} was computed with another model than this run's reference "
                f"(hash {made.model_hash[:12]}…, here {str(found[0])[:12]}…): other weights, another "
                "configuration or dtype; make the file anew with `fastpo ref-logps`"
            )
        if made.precision != precision:
            warnings.warn(
                f"ref_logps: {path} was computed with mixed precision {made.precision!r}, this run has "
                f"{precision!r}: policy and reference round differently",
                stacklevel=3,
            )
        here = Origin.of(
            self.args,
            self.processing_class,
            model_hash=made.model_hash,
            precision=precision,
        )
        self._take_datasets(
            {
                name: with_file_logps(rows, name, file, here)
                for name, rows in self._datasets().items()
            }
        )
