"""``SparseZOTrainer``: transformers' ``Trainer`` with zeroth-order steps.

A step computes the loss of the complete batch at two or more perturbed values of the masked weights. The batch's
gradient accumulation parts are processed one after the other. Nothing is backpropagated, so there are no gradients to
clip, scale, reduce or check. Everything outside of the step is unchanged Trainer code.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_accelerate_available

from . import stream
from .errors import ConfigError
from .estimator import Estimator, NonFinite
from .extras import install_hint
from .mask import SparseMask
from .optimizer import SparseZO
from .trainer_checks import UPDATES, check_arguments, check_checkpoint, check_processes
from .updates import Update, read_updates, write_updates


@dataclass(frozen=True)
class _Part:
    """One gradient accumulation part of a batch.

    Args:
        inputs: inputs of the forward pass.
        items: number of items (tokens) in the complete batch, that the loss is a mean over; None if Trainer does not
            know it.
        parts: number of parts of the batch.
    """

    inputs: dict[str, Any]
    items: Tensor | int | None
    parts: int


class _StepOnlyWithClosure(SparseZO):
    """``SparseZO`` whose ``step()`` without a closure does nothing.

    Trainer calls ``step()`` after ``training_step``, which has already done the zeroth-order step.
    """

    def step(self, closure: Callable[[], Tensor | float] | None = None, seed: int | None = None) -> Tensor | None:  # type: ignore[override]
        return None if closure is None else super().step(closure, seed)


class SparseZOTrainer(Trainer):
    """``Trainer`` that fine-tunes the masked elements of its model with zeroth-order steps.

    The forward passes of a step run in evaluation mode, as in MeZO: with fresh dropout in each, their losses would
    differ by more than the perturbation. Logs contain ``projected_gradient``, that of the latest step, instead of
    ``grad_norm``. Every checkpoint and saved model comes with ``updates.jsonl``, from which ``replay`` reconstructs its
    weights, given the base model and the mask. With several processes the loss is the mean over all of them, and all
    have the same weights.

    Args:
        *args: see ``Trainer``. ``args.learning_rate`` and ``args.seed`` are learning rate and root seed of the
            optimizer.
        mask: the model's mask.
        eps: perturbation scale, positive.
        queries: number of perturbations (queries) per step, at least 1.
        estimator: "two-point" or "forward-difference"; see ``SparseZO``.
        nonfinite: "raise" or "skip", how to handle a query whose losses or coefficient are NaN or infinite; see
            ``SparseZO``.
        backend: "auto", "torch", "numba" or "triton"; see ``SparseZO``.
        **kwargs: see ``Trainer``.

    Attributes:
        zo: the optimizer; None before the first training.

    Raises:
        ConfigError: for arguments about gradients or another optimizer, for several GPUs in one process, and if the
            package accelerate is missing.
    """

    optimizer: Any  # Trainer's attribute: wrapped by accelerate when training starts

    def __init__(
        self,
        *args: Any,
        mask: SparseMask,
        eps: float = 1e-3,
        queries: int = 1,
        estimator: str = Estimator.TWO_POINT,
        nonfinite: str = NonFinite.RAISE,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if not is_accelerate_available():
            raise ConfigError(f"SparseZOTrainer needs the package accelerate; {install_hint('trainer')}")
        self.mask = mask
        self._zo_options = {
            "eps": eps,
            "queries": queries,
            "estimator": estimator,
            "nonfinite": nonfinite,
            "backend": backend,
        }
        self.zo: SparseZO | None = None
        self._updates: list[Update] = []
        self._pending: list[tuple[int, float]] = []  # seed and lr of updates whose scalar is still on the device
        self._parts: list[_Part] = []
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ConfigError(
                "SparseZOTrainer creates its optimizer itself, from mask, eps, queries and the training arguments; do "
                "not pass one"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator, as Trainer does, but leaves the model on its device and unwrapped.

        Raises:
            ConfigError: for unsupported arguments, and if a launcher enabled DeepSpeed or FSDP.
        """
        check_arguments(self.args)
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # enabled by accelerate's launcher
            raise ConfigError(
                "SparseZOTrainer does not support DeepSpeed or FSDP, because every device must hold all weights; start "
                "the training without them"
            )
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
            # No DistributedDataParallel: there are no gradients to reduce. Trainer has already placed the model.
            return cast(nn.Module, prepare(model, device_placement=False, evaluation_mode=True))

        self.accelerator.prepare_model = prepare_model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer for the next training. An optimizer of an earlier training is reused.

        Args:
            model: model to optimize; None is the trainer's model.

        Raises:
            ConfigError: if the processes have different models or masks.
        """
        self._parts.clear()
        if self.optimizer is None:
            optimized = self.model if model is None else model
            options = {"lr": self.args.learning_rate, "seed": self.args.seed, **self._zo_options}
            self.optimizer = self.zo = _StepOnlyWithClosure(optimized, self.mask, **options)
            check_processes(self.accelerator, optimized, self.mask)
        return cast(torch.optim.Optimizer, self.optimizer)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        """Trains; see ``Trainer.train``.

        Raises:
            ConfigError: if the checkpoint to resume from lacks a file that is needed.
        """
        if resume_from_checkpoint is True:  # if there is no checkpoint, Trainer raises
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._load_updates(resume_from_checkpoint)
        elif self.zo is None or self.model_init is not None:
            self._updates, self._pending = [], []
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collects the parts of a batch, and does the step when it has the last one.

        Args:
            model: the model.
            inputs: inputs of the part's forward pass.
            num_items_in_batch: number of items (tokens) in the complete batch, that the loss is a mean over; None if
                Trainer does not know it.

        Returns:
            float32 scalar: the step's loss, or 0 for a part that is not the last.

        Raises:
            NonFiniteLossError: see ``SparseZO.step``.
        """
        assert self.zo is not None
        model.eval()
        inputs = dict(self._prepare_inputs(inputs))
        self._parts.append(_Part(inputs, num_items_in_batch, self.current_gradient_accumulation_steps))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        parts, self._parts = self._parts, []
        rate = float(self.zo.param_groups[0]["lr"]) / self.zo.queries
        seeds = [stream.step_seed(self.zo.seed, 0, self.zo.steps, j) for j in range(self.zo.queries)]
        loss = self.zo.step_many([lambda: self._loss(model, parts)])[0]
        self._pending += [(seed, rate) for seed in seeds]
        return loss

    @property
    def updates(self) -> list[Update]:
        """All updates from the base model to the current weights, as (seed, lr, g) in the format of ``replay``."""
        if self.zo is not None:
            gradients = self.zo.projected_gradients
            self._updates += [(seed, lr, g) for (seed, lr), g in zip(self._pending, gradients, strict=True)]
            self._pending.clear()
            gradients.clear()
        return self._updates

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs like ``Trainer.log``, with ``projected_gradient`` in place of ``grad_norm``.

        Its value is the mean over the queries of the latest step; it is NaN if one of them was skipped.
        """
        if "grad_norm" in logs and self.zo is not None:
            del logs["grad_norm"]
            latest = [g for _, _, g in self.updates[-self.zo.queries :]]
            logs["projected_gradient"] = sum(latest) / len(latest)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model like ``Trainer.save_model``, and the updates that lead to it in ``updates.jsonl``."""
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            write_updates(directory / UPDATES, self.updates)
        super().save_model(output_dir, _internal_call)

    def _loss(self, model: nn.Module, parts: list[_Part]) -> Tensor:
        """Loss of the complete batch, averaged over all processes: float32 scalar, summed in float64."""
        total = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        for part in parts:
            with self.compute_loss_context_manager():
                # A copy, because compute_loss removes the labels from its inputs.
                loss = self.compute_loss(model, dict(part.inputs), num_items_in_batch=part.items)
            total += loss.double() if self._is_scaled(part) else loss.double() / part.parts
        if self.args.world_size > 1:  # gathered, not reduced, so that all processes add in the same order
            total = self.accelerator.gather(total).mean()
        return total.float()

    def _is_scaled(self, part: _Part) -> bool:
        """Whether the batch's loss is the sum of the parts' losses (True) or their mean (False). Trainer's own rule."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_items = self.model_accepts_loss_kwargs and part.items is not None
        return by_items or self.compute_loss_func is not None

    def _load_best_model(self) -> None:
        """Loads the best model like Trainer, and also its updates and its fp32 masters."""
        assert self.zo is not None
        best, steps = self.state.best_model_checkpoint, self.zo.steps
        self._load_updates(best)
        super()._load_best_model()
        self._load_optimizer_and_scheduler(best)
        self.zo.steps = steps  # so that another training uses new seeds

    def _load_updates(self, checkpoint: str) -> None:
        """Loads the updates of a checkpoint.

        Raises:
            ConfigError: if the checkpoint lacks one of the files that training resumes from.
        """
        check_checkpoint(checkpoint)
        self.updates.clear()
        self._updates = read_updates(Path(checkpoint, UPDATES))


__all__ = ["UPDATES", "SparseZOTrainer"]
