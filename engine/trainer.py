"""``SparseZOTrainer``: transformers' ``Trainer`` with zeroth-order steps.

A step computes the loss of the complete batch at two or more perturbed values of the masked weights. The batch's
gradient accumulation parts are processed one after the other. Nothing is backpropagated, so there are no gradients to
clip, scale, reduce or check. Everything outside of the step is unchanged Trainer code.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_accelerate_available

from .captured import BoundLoss, Capture, check_capture
from .errors import ConfigError
from .estimator import Estimator, NonFinite, warn_low_precision
from .extras import install_hint
from .mask import SparseMask
from .optimizer import SparseZO
from .trainer_checks import (
    UPDATES,
    check_arguments,
    check_checkpoint,
    check_is_saved,
    check_processes,
    check_same_settings,
    settings_of,
)
from .updates import UpdateLog
from .weights import MaskedWeights


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

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None, seed: Any = None) -> Tensor | None:  # type: ignore[override]
        return None if closure is None else self._step(closure, seed)  # not super().step: hooks would run twice


class _Float32LabelSmoother(LabelSmoother):
    """``LabelSmoother`` that computes in float32, whatever the dtype of the logits.

    In bfloat16 its loss has three digits, and the difference of two losses none.
    """

    def __call__(self, model_output: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        return cast(Tensor, super().__call__({"logits": logits.float()}, labels, *args, **kwargs))


class SparseZOTrainer(Trainer):
    """``Trainer`` that fine-tunes the masked elements of its model with zeroth-order steps.

    The forward passes of a step run in evaluation mode, as in MeZO: with fresh dropout in each, their losses would
    differ by more than the perturbation. Logs contain ``projected_gradient``, that of the latest step, instead of
    ``grad_norm``. Every checkpoint and saved model comes with ``updates.jsonl``, from which ``replay`` reconstructs its
    weights, given the base model and the mask. With several processes the loss is the mean over all of them, and all
    have the same weights.

    The loss should be float32: in bfloat16 or float16 the difference of two losses has few digits or none, and the
    Trainer warns. Models for classification return the loss in their own dtype; for these pass a
    ``compute_loss_func`` that computes the loss of ``outputs.logits.float()``.

    Args:
        *args: see ``Trainer``. ``args.learning_rate`` and ``args.seed`` are learning rate and root seed of the
            optimizer.
        mask: the model's mask.
        eps: perturbation scale, positive.
        queries: number of perturbations (queries) per step, at least 1.
        estimator: "two-point", "forward-difference" or "normalized-difference"; see ``SparseZO``.
        nonfinite: "raise" or "skip", how to handle a query whose losses or coefficient are NaN or infinite; see
            ``SparseZO``.
        backend: "auto", "torch", "numba" or "triton"; see ``SparseZO``.
        frozen: whether masked parameters may have ``requires_grad=False``; see ``SparseZO``.
        capture: "auto" or "off": whether steps are captured as CUDA graphs where that is possible; see ``SparseZO`` and
            ``BoundLoss``. Steps of several processes are not, because their losses are gathered.
        **kwargs: see ``Trainer``.

    Attributes:
        zo: the optimizer; None before the first training.

    Raises:
        ConfigError: for arguments about gradients or another optimizer, for several GPUs in one process, and if the
            package accelerate is missing.
    """

    optimizer: Any  # Trainer's attribute: wrapped by accelerate when training starts
    label_smoother: Any  # Trainer's attribute

    def __init__(
        self,
        *args: Any,
        mask: SparseMask,
        eps: float = 1e-3,
        queries: int = 1,
        estimator: str = Estimator.TWO_POINT,
        nonfinite: str = NonFinite.RAISE,
        backend: str = "auto",
        frozen: bool = False,
        capture: str = Capture.AUTO,
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
            "frozen": frozen,
            "capture": check_capture(capture),
        }
        self.zo: SparseZO | None = None
        self._loaded_log: UpdateLog | None = None  # of the checkpoint that the optimizer was loaded from
        self._parts: list[_Part] = []
        self._forward_model: nn.Module | None = None  # the model of the present step
        self._warned_of_dtype = False
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            self.label_smoother = _Float32LabelSmoother(epsilon=self.args.label_smoothing_factor)
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
            ConfigError: if the processes have different models, masks or settings, or the mask has elements of a
                parameter that ``save_model`` does not save.
            ValueError: if a masked parameter is frozen, and the trainer was not created with ``frozen=True``.
        """
        self._parts.clear()
        if self.optimizer is None:
            optimized = self.model if model is None else model
            check_is_saved(self.accelerator.unwrap_model(optimized, keep_torch_compile=False), self.mask)
            options = {"lr": self.args.learning_rate, "seed": self.args.seed, **self._zo_options}
            self.optimizer = self.zo = _StepOnlyWithClosure(optimized, self.mask, **options)
            check_processes(self.accelerator, optimized, self.zo)
        return cast(torch.optim.Optimizer, self.optimizer)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        """Trains; see ``Trainer.train``.

        Raises:
            ConfigError: if the checkpoint to resume from lacks a file that is needed, or was trained with another mask
                or other settings of the steps than this trainer has.
        """
        if resume_from_checkpoint is True:  # if there is no checkpoint, Trainer raises
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            check_checkpoint(resume_from_checkpoint)
        elif self.model_init is not None:
            self._loaded_log = None
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
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        parts, self._parts, self._forward_model = self._parts, [], model
        if self.args.world_size > 1:  # losses are gathered from all processes, which is not captured
            return self.zo.step_many([functools.partial(self._loss, parts)])[0]
        return self.zo.step_many([BoundLoss(self._loss, parts)])[0]

    @property
    def update_log(self) -> UpdateLog:
        """All updates from the base model to the current weights, also those before a resume; see ``replay``."""
        if self.zo is None:
            weights = MaskedWeights(self.model, self.mask)
            return UpdateLog(mask=self.mask.digest, start=weights.digest(), updates=(), end=weights.digest())
        return self.zo.log if self._loaded_log is None else self._loaded_log + self.zo.log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs like ``Trainer.log``, with ``projected_gradient`` in place of ``grad_norm``.

        Its value is the mean over the queries of the latest step; it is NaN if one of them was skipped.
        """
        if "grad_norm" in logs and self.zo is not None:
            del logs["grad_norm"]
            latest = self.zo.projected_gradients[-self.zo.queries :]
            if latest:  # the caller may have cleared the list
                logs["projected_gradient"] = sum(latest) / len(latest)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model like ``Trainer.save_model``, and the updates that lead to it in ``updates.jsonl``."""
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self.update_log.save(directory / UPDATES)
        super().save_model(output_dir, _internal_call)

    def _loss(self, parts: list[_Part]) -> Tensor:
        """Loss of the complete batch, averaged over all processes: float32 scalar, summed in float64."""
        total = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        for part in parts:
            with self.compute_loss_context_manager():
                # A copy, because compute_loss removes the labels from its inputs.
                loss = self.compute_loss(self._forward_model, dict(part.inputs), num_items_in_batch=part.items)
            self._check_loss(loss)
            total += loss.double() if self._is_scaled(part) else loss.double() / part.parts
        if self.args.world_size > 1:  # gathered, not reduced, so that all processes add in the same order
            total = self.accelerator.gather(total).mean()
        return total.float()

    def _check_loss(self, loss: Tensor) -> None:
        """Raises ``ConfigError`` unless a part's loss is one number; warns once if its dtype is too coarse."""
        if loss.numel() != 1:
            raise ConfigError(f"compute_loss must return one loss, got a tensor of shape {list(loss.shape)}")
        if loss.dtype in (torch.bfloat16, torch.float16) and not self._warned_of_dtype:
            self._warned_of_dtype = True
            warn_low_precision(loss.dtype)

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
        check_checkpoint(best)
        super()._load_best_model()
        self._load_optimizer_and_scheduler(best)
        self.zo.steps = steps  # so that another training uses new seeds

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads optimizer and scheduler like Trainer, and also the updates that lead to their state.

        Raises:
            ConfigError: if the checkpoint was trained with another mask or other settings of the steps, or its files do
                not belong together.
        """
        if checkpoint is None:
            return
        assert self.zo is not None
        settings = settings_of(self.zo)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ConfigError(f"training cannot resume from the checkpoint {checkpoint}: {error}") from error
        check_same_settings(checkpoint, settings_of(self.zo), settings)
        self._loaded_log = UpdateLog.load(Path(checkpoint, UPDATES))
        if self._loaded_log.end != self.zo.weights.digest():
            raise ConfigError(f"checkpoint {checkpoint}: its {UPDATES} ends at other weights than its optimizer.pt has")
        check_processes(self.accelerator, self.model, self.zo)


__all__ = ["UPDATES", "SparseZOTrainer"]
