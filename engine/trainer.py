"""``SparseZOTrainer``: transformers' ``Trainer`` with zeroth-order steps; all around the step is Trainer's own.

A step takes the loss of the whole batch, its gradient accumulation parts one after the other, at two points or more of
the masked weights. Nothing is backpropagated, and there are no gradients to clip, scale, reduce or check.
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
    """One part of a batch: what the loss is computed from, and by what Trainer would have it divided."""

    inputs: dict[str, Any]
    items: Tensor | int | None
    parts: int


class _StepTakenInTrainingStep(SparseZO):
    """Trainer calls ``step()`` after ``training_step``, which has taken the step: without a closure it does nothing."""

    def step(self, closure: Callable[[], Tensor | float] | None = None, seed: int | None = None) -> Tensor | None:  # type: ignore[override]
        return None if closure is None else super().step(closure, seed)


class SparseZOTrainer(Trainer):
    """``Trainer`` that tunes the masked elements of its model by zeroth-order steps.

    The forwards of a step are taken in evaluation mode, as in MeZO: with dropout drawn anew in each, their losses would
    differ by more than the perturbation. Logs hold ``projected_gradient``, of the latest step, instead of
    ``grad_norm``. Every checkpoint and saved model has ``updates.jsonl`` beside it, from which ``replay`` makes it of
    the base model. With several processes the loss is the mean over all; the weights are the same on each.

    Args:
        *args: as for ``Trainer``; so are the keywords that are not named here. ``args.learning_rate`` and
            ``args.seed`` are the optimizer's.
        mask: of the model.
        eps: see ``SparseZO``, like the following.
        queries: perturbations a step.
        estimator: "two-point" or "forward-difference".
        nonfinite: "raise" or "skip".
        backend: "auto", "torch", "numba" or "triton".
        **kwargs: as for ``Trainer``.

    Attributes:
        zo: the optimizer, once a training has begun.

    Raises:
        ConfigError: for arguments that say something about gradients or another optimizer, for several GPUs in one
            process, and without the package accelerate.
    """

    optimizer: Any  # as Trainer has it: wrapped once a training has begun

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
        self._options = {
            "eps": eps,
            "queries": queries,
            "estimator": estimator,
            "nonfinite": nonfinite,
            "backend": backend,
        }
        self.zo: SparseZO | None = None
        self._updates: list[Update] = []
        self._unread: list[tuple[int, float]] = []  # seed and lr of updates whose scalar is still on the device
        self._parts: list[_Part] = []
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ConfigError("SparseZOTrainer makes its optimizer itself, of mask, eps, queries and the arguments")

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer does, but that the model stays what and where it is."""
        check_arguments(self.args)
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # by accelerate's launcher
            raise ConfigError("SparseZOTrainer needs the weights whole on every device: no DeepSpeed, no FSDP")
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
            # no DistributedDataParallel, since there are no gradients to reduce; Trainer has placed the model before
            return cast(nn.Module, prepare(model, device_placement=False, evaluation_mode=True))

        self.accelerator.prepare_model = prepare_model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the coming training; one that has trained before goes on."""
        self._parts.clear()
        if self.optimizer is None:
            of = self.model if model is None else model
            options = {"lr": self.args.learning_rate, "seed": self.args.seed, **self._options}
            self.optimizer = self.zo = _StepTakenInTrainingStep(of, self.mask, **options)
            check_processes(self.accelerator, of, self.mask)
        return cast(torch.optim.Optimizer, self.optimizer)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        """As ``Trainer.train``.

        Raises:
            ConfigError: if the checkpoint to go on from lacks a file that it takes.
        """
        if resume_from_checkpoint is True:  # Trainer says so if there is none
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            self._load_updates(resume_from_checkpoint)
        elif self.zo is None or self.model_init is not None:
            self._updates, self._unread = [], []
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keeps a part of the batch, and takes the step when it is the last.

        Args:
            model: the model.
            inputs: of one forward pass.
            num_items_in_batch: that the whole batch's loss is a mean over, where Trainer knows it.

        Returns:
            The step's loss, or 0 before the last part: float32 scalar.

        Raises:
            NonFiniteLossError: as ``SparseZO.step``.
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
        self._unread += [(seed, rate) for seed in seeds]
        return loss

    @property
    def updates(self) -> list[Update]:
        """(seed, lr, g) of the updates that lead from the base model to the weights, as ``replay`` takes them."""
        if self.zo is not None:
            gradients = self.zo.projected_gradients
            self._updates += [(seed, lr, g) for (seed, lr), g in zip(self._unread, gradients, strict=True)]
            self._unread.clear()
            gradients.clear()
        return self._updates

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``, with ``projected_gradient`` for ``grad_norm``.

        It is the mean over the queries of the latest step, and NaN where one of them was skipped.
        """
        if "grad_norm" in logs and self.zo is not None:
            del logs["grad_norm"]
            latest = [g for _, _, g in self.updates[-self.zo.queries :]]
            logs["projected_gradient"] = sum(latest) / len(latest)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``, and the updates that lead there."""
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            write_updates(directory / UPDATES, self.updates)
        super().save_model(output_dir, _internal_call)

    def _loss(self, model: nn.Module, parts: list[_Part]) -> Tensor:
        """Loss of the whole batch, a mean over all processes: summed in float64, float32 scalar."""
        total = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        for part in parts:
            with self.compute_loss_context_manager():
                # a copy, since compute_loss takes the labels out of it
                loss = self.compute_loss(model, dict(part.inputs), num_items_in_batch=part.items)
            total += loss.double() if self._is_scaled(part) else loss.double() / part.parts
        if self.args.world_size > 1:  # gathered, so that all processes add in the same order
            total = self.accelerator.gather(total).mean()
        return total.float()

    def _is_scaled(self, part: _Part) -> bool:
        """Whether the losses of the parts add up to that of the batch, or have it as their mean; as in Trainer."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_items = self.model_accepts_loss_kwargs and part.items is not None
        return by_items or self.compute_loss_func is not None

    def _load_best_model(self) -> None:
        """As Trainer does, and with the model the masters that its weights are roundings of."""
        assert self.zo is not None
        best, steps = self.state.best_model_checkpoint, self.zo.steps
        self._load_updates(best)
        super()._load_best_model()
        self._load_optimizer_and_scheduler(best)
        self.zo.steps = steps  # another training takes other seeds

    def _load_updates(self, checkpoint: str) -> None:
        """Those of a checkpoint, once it is clear that Trainer will find there what belongs to them."""
        check_checkpoint(checkpoint)
        self.updates.clear()
        self._updates = read_updates(Path(checkpoint, UPDATES))


__all__ = ["UPDATES", "SparseZOTrainer"]
