"""``MaskedWeights``: the masked elements of a live model, their fp32 masters, and three operations on them.

    perturb:  w <- cast(master + scale * z)
    restore:  w <- cast(master)
    update:   master <- master - c * z,  w <- cast(master)

The live weight is always its rounded, possibly perturbed master. Elements outside the mask are never written. Every
operation runs to its end: if an exception hits it, such as KeyboardInterrupt, it is completed before that is raised.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from ..triton_kernels import ElementTable, Layout, reference
from .device_values import DeviceValues, to_device_async
from .errors import ModelChangedError
from .launch_groups import LaunchGroup, MaskedParameter, launch_groups
from .mask import SparseMask
from .model_watch import ModelWatch
from .passes import Passes
from .stream import check_seed

# One pass of an operation over a launch group. Arguments: the group, the number of updates before the pass, and whether
# the pass is repeated because an exception hit it.
_Pass = Callable[[LaunchGroup, int, bool], None]


def round_fp32(value: float) -> float:
    """Rounds to the nearest fp32 number."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


class MaskedWeights:
    """The masked elements of one model in memory.

    Holds 8 bytes per masked element (master and offset) on the device of the weights; 4 where all elements of a
    parameter are masked.

    Args:
        model: the model. Its parameters with masked elements must be float32, bfloat16 or float16, and contiguous;
            every operation writes them.
        mask: a mask made for this model.
        backend: "auto", "torch", "numba" or "triton"; see ``backend.resolve``.
        groups: group number by parameter name, for updates with one coefficient per group. None puts all parameters
            into group 0.
        debug: whether each operation checks first that nothing has written the masked weights since the one before.
            Holds a copy of them, and makes the host wait.

    Attributes:
        mask: the mask.
        values: makes seeds and scales for the operations, on the device of the first masked parameter.
        updates: number of updates applied so far, those without effect included (see ``run_program_``).
        replacements: number of times that the masters were replaced, or updates were replayed.

    Raises:
        MaskError: if the mask was made for another model, or a masked parameter shares memory with another parameter.
        ValueError: if a masked parameter is not contiguous, or of a dtype or kind that the operations cannot write.
        ConfigError: if the backend is not available.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        backend: str = "auto",
        groups: Mapping[str, int] | None = None,
        *,
        debug: bool = False,
    ) -> None:
        mask.check(model)
        self.mask = mask
        self._launch_groups = launch_groups(model, mask, groups or {}, backend)
        self._watch = ModelWatch(model, self._parameters())
        self.values = DeviceValues(self._launch_groups[0].master.device)
        self.updates = self.replacements = 0
        # Pass that is not complete yet: the pass, the state afterwards, the number of updates before it and after it.
        self._unfinished: tuple[_Pass, bool, int, int] | None = None
        self._restored = True  # whether the live weights should be cast(master), or may be perturbed
        self._debug = debug
        self._written = self.live() if debug else None  # live weights after the last operation

    @property
    def restored(self) -> bool:
        """Whether the live weights are ``cast(master)``, if nothing else has written them."""
        return self._restored and self._unfinished is None

    def names(self) -> list[str]:
        """Names of the parameters that have masked elements, in id order."""
        return [p.name for p in self._parameters()]

    def tables(self) -> list[ElementTable]:
        """Tables of the masked elements. Each operation launches once per table."""
        return [group.table for group in self._launch_groups]

    def perturb_(self, seed: Tensor, scale: Tensor) -> None:
        """Sets ``w <- cast(master + scale * z)``.

        All operations take such tensors, which the device reads when the operation runs. So a captured launch can be
        replayed with other values.

        Args:
            seed: int64 [1], seed of ``z``; see ``values``.
            scale: float32 [1], ``+eps`` or ``-eps``; see ``values``.

        Raises:
            ModelChangedError: if the model was moved, cast or rebuilt, in this and all other operations.
        """
        self._run(lambda group, *_: _perturb_(group, seed, scale), restored=False)

    def restore_(self) -> None:
        """Sets ``w <- cast(master)``, exactly."""
        self._run(lambda group, *_: _restore_(group), restored=True)

    def coefficients(self, losses: Tensor, eps: Tensor, lr: Tensor) -> Tensor:
        """Computes mean loss, projected gradient and each group's ``c`` from two losses; ``reference.coefficients``."""
        return self._launch_groups[0].backend.coefficients(losses, eps, lr)

    def update_(self, seed: Tensor, c: Tensor, *, anywhere: bool = False) -> None:
        """Applies ``master <- master - c * z``, then ``w <- cast(master)``.

        Args:
            seed: int64 [1], seed of ``z``.
            c: float32 [groups], coefficient ``lr * g`` of each group.
            anywhere: whether a model that was moved, cast or rebuilt is accepted. Then the masters are updated, but its
                weights are not written.
        """

        def run(group: LaunchGroup, number: int, repeated: bool) -> None:
            if repeated and group.has_updates(number + 1):
                _restore_(group)
                return
            group.backend.update_(
                group.table, group.master, group.to_device(seed), group.coefficient(c),
                applied=group.applied, number=number,
            )  # fmt: skip

        self._run(run, restored=True, updates=1, check=not anywhere)

    def update_perturb_(self, seed: Tensor, c: Tensor, next_seed: Tensor, scale: Tensor) -> None:
        """Does ``update_(seed, c)``, then ``perturb_(next_seed, scale)``, in one pass over the weights."""

        def run(group: LaunchGroup, number: int, repeated: bool) -> None:
            if repeated and group.has_updates(number + 1):
                _perturb_(group, next_seed, scale)
                return
            group.backend.update_perturb_(
                group.table, group.master, group.to_device(seed), group.coefficient(c), group.to_device(next_seed),
                group.to_device(scale), applied=group.applied, number=number,
            )  # fmt: skip

        self._run(run, restored=False, updates=1)

    def run_program_(self, program: Callable[[Passes], None], updates: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Runs a program that applies updates and then perturbs the weights: all of a step, with its forwards.

        It may replay a captured graph: the host cannot tell how far that has come. If an exception hits the program,
        the updates that are missing are applied, and the weights are restored.

        Args:
            program: applies exactly these updates, in order, and leaves the weights perturbed. It is called once, with
                the passes that it may use.
            updates: (seed int64 [1], coefficients float32 [groups]) of each update; NaN for one without effect, which
                is counted like the others.
        """

        def complete(group: LaunchGroup, number: int, repeated: bool) -> None:
            for i, (seed, c) in enumerate(updates, number):
                if not group.has_updates(i + 1):
                    group.backend.update_(
                        group.table, group.master, group.to_device(seed), group.coefficient(c),
                        applied=group.applied, number=i,
                    )  # fmt: skip
            _restore_(group)

        self._prepare_pass(check=True)
        after = self.updates + len(updates)
        self._unfinished = (complete, True, self.updates, after)
        try:
            program(Passes(self._launch_groups, self.updates))
        except BaseException:
            self._complete()
            raise
        # No call in between, see ``_run``.
        self._unfinished, self._restored, self.updates = None, False, after

    def passes(self) -> Passes:
        """Returns the passes of a program that is recorded, not run."""
        return Passes(self._launch_groups, self.updates)

    def replay_(self, seeds: Sequence[int], c: Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Applies many updates in order, in one pass over the weights: the bits of ``update_`` for each.

        Args:
            seeds: seed of each update, in [0, 2**64).
            c: coefficient of each update, the same for all groups; or for each update a sequence with one coefficient
                for each group.

        Raises:
            ValueError: if a coefficient is not finite in fp32.
            ModelChangedError: also if something else has written the masked weights, see ``check_not_overwritten``.
        """
        if not len(seeds):
            if not self.restored:
                self.restore_()
            return
        coefficients = torch.tensor(c, dtype=torch.float32, device="cpu").reshape(len(seeds), -1)
        if not coefficients.isfinite().all():
            position = int((~coefficients.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"the coefficient lr * g of update {position} is {c[position]}, which fp32 cannot hold")
        device_seeds, on_device = (
            self.values.seeds(seeds),
            to_device_async(coefficients.T.contiguous(), self.values.device),
        )

        def run(group: LaunchGroup, number: int, repeated: bool) -> None:
            if repeated and group.has_updates(number + len(seeds)):
                _restore_(group)
                return
            group.backend.replay_(
                group.table, group.master, group.to_device(device_seeds),
                group.to_device(on_device[group.group if len(on_device) > 1 else 0]),
                applied=group.applied, number=number,
            )  # fmt: skip

        self.check_not_overwritten()
        self.replacements += 1
        self._run(run, restored=True, updates=len(seeds))

    def unchanged_fraction(self, seed: SupportsIndex, eps: float) -> float:
        """Share of the masked elements whose weight neither ``+eps`` nor ``-eps`` would change, in [0, 1].

        Counts elements with ``cast(master + scale * z) == cast(master)``, bit for bit, for both scales. Nothing is
        written, and the result does not depend on the current weights. Temporaries: about 40 bytes per element, for a
        few million elements at a time.

        Args:
            seed: seed of ``z``, in [0, 2**64).
            eps: perturbation scale.
        """
        number = check_seed(seed)
        self.check_same_model()
        scale, unchanged = self.values.numbers([eps], torch.float32), 0
        for group in self._launch_groups:
            for start, stop in reference.windows(group.table):
                step = group.backend.normal(number, group.table.ids(start, stop)) * group.to_device(scale)
                master, dtype = group.master[start:stop], group.parameters[0].dtype
                unmoved = _same_bits(master + step, master, dtype) & _same_bits(master - step, master, dtype)
                tensor_slices = group.table.tensor_slices(start, stop)
                unchanged += int(
                    torch.stack([unmoved[low - start : high - start].sum() for _, low, high in tensor_slices]).sum()
                )
        return unchanged / len(self.mask)

    def masters(self) -> Tensor:
        """Returns a copy of the masters: float32 [k] in mask order, on the device of the first masked parameter."""
        self._complete()
        out = torch.empty(len(self.mask), dtype=torch.float32, device=self._launch_groups[0].master.device)
        for group in self._launch_groups:
            for p, start, stop in group.slot_ranges():
                out[p.start : p.stop] = group.master[start:stop]
        return out

    def live(self) -> Tensor:
        """Returns a copy of the live masked weights: float32 [k] in mask order, on the device of ``masters``."""
        out = torch.empty(len(self.mask), dtype=torch.float32, device=self._launch_groups[0].master.device)
        for group in self._launch_groups:
            for p, live, _ in group.live_and_wanted():
                out[p.start : p.stop] = live
        return out

    def set_masters_(self, values: Tensor) -> None:
        """Sets the masters, all or none of them, and restores the weights to them.

        Args:
            values: finite values, float32 [k], in mask order.

        Raises:
            ValueError: if ``values`` has another shape or dtype, or is not finite.
        """
        self.check_masters(values)
        self.check_same_model()
        self._complete()
        masters = values.clone()  # the caller may change its tensor before an interrupted pass is repeated

        def run(group: LaunchGroup, number: int, repeated: bool) -> None:
            for p, start, stop in group.slot_ranges():
                group.master[start:stop] = masters[p.start : p.stop]  # in place: captured graphs hold the address
            _restore_(group)

        self._replace_masters_(run)

    def saved(self) -> list[Tensor]:
        """Copies the masters for ``put_back_``: float32 [slots] of each table, on its device."""
        self._complete()
        return [group.master.clone() for group in self._launch_groups]

    def put_back_(self, saved: Sequence[Tensor]) -> None:
        """Sets the masters to what they were, all or none of them, and restores the weights to them.

        A copy a table and no check of values: less work than ``masters`` and ``set_masters_``.

        Args:
            saved: result of ``saved``.
        """
        self.check_same_model()
        self._complete()
        saved_of = {id(group): master for group, master in zip(self._launch_groups, saved, strict=True)}

        def run(group: LaunchGroup, number: int, repeated: bool) -> None:
            group.master.copy_(saved_of[id(group)])
            _restore_(group)

        self._replace_masters_(run)

    def _replace_masters_(self, pass_: _Pass) -> None:
        """Runs a pass that replaces the masters and restores the weights."""
        # Together, without a call in between: an exception finds all of it to do, or nothing.
        self.replacements, self._unfinished = self.replacements + 1, (pass_, True, self.updates, self.updates)
        try:
            self._complete()
        except BaseException:
            self._complete()
            raise

    def check_masters(self, values: Tensor) -> None:
        """Raises ``ValueError`` unless ``values`` are masters for this mask: finite, float32 [k]."""
        if values.shape != self.mask.ids.shape or values.dtype != torch.float32:
            raise ValueError(f"masters must be float32 [{len(self.mask)}], got {values.dtype} {list(values.shape)}")
        finite = values.isfinite()
        if not finite.all():
            position = int((~finite).nonzero()[0])
            raise ValueError(f"masters must be finite; position {position} holds {values[position].item()}")

    def digest(self) -> str:
        """SHA-256 of the mask, the dtypes of the masked parameters and the masters: what updates are applied to."""
        digest = hashlib.sha256(self.mask.digest.encode())
        for p in self._parameters():
            digest.update(f" {p.name} {p.dtype}".encode())
        digest.update(self.masters().cpu().numpy())  # type: ignore[arg-type]
        return digest.hexdigest()

    def count_overwritten(self) -> Tensor:
        """Counts what should not be, without making the host wait: int64 [2] on the device of ``values``.

        The first is the number of live weights that are not ``cast(master)`` although nothing is perturbed: something
        else has written them. The second is the number of masters that the weights' dtype cannot hold.
        """
        self.check_same_model()
        self._complete()
        counts = torch.zeros(2, dtype=torch.int64, device=self.values.device)
        if self._restored:
            for group in self._launch_groups:
                own = (
                    counts if group.master.device == counts.device else counts.new_zeros(2, device=group.master.device)
                )
                group.backend.compare(group.table, group.master, own)
                if own is not counts:
                    counts += group.to_device(own).to(counts.device, non_blocking=True)
        return counts

    def check_not_overwritten(self) -> None:
        """Raises ``ModelChangedError`` if something else has written the masked weights; waits for the device.

        The error also comes if a weight is infinite because its dtype cannot hold its master.
        """
        self.check_counts(self.count_overwritten())

    def check_masters_are_current(self) -> None:
        """Raises ``ModelChangedError`` if the masters are not those of the model; waits for the device.

        A model that was moved or cast is no error.
        """
        self._watch.check_present()
        self._check_beside()
        if self._watch.are_in_place():
            self.check_not_overwritten()

    def check_counts(self, counts: Tensor) -> None:
        """Raises ``ModelChangedError`` unless both counts of ``count_overwritten`` are 0."""
        changed, beyond = counts.tolist()
        if changed:
            names = [p.name for group in self._launch_groups for p in group.differing()]
            written = f"something else has written {changed} of the {len(self.mask)} masked weights"
            if not names:  # found on a GPU, after the step
                raise ModelChangedError(
                    f"{written}, and the step has put the old values back; call the optimizer's `reload()` right after "
                    f"writing weights"
                )
            raise ModelChangedError(
                f"{written}, the first in {names[0]!r}; `reload()` of the optimizer continues from the new values, "
                f"`restore()` puts the old ones back"
            )
        if beyond:
            raise ModelChangedError(
                f"updates have taken {beyond} masked weights beyond the range of their dtype, so they are infinite; "
                f"use a smaller learning rate, or bfloat16 or float32 weights"
            )

    def check_same_model(self) -> None:
        """Raises ``ModelChangedError`` if a masked parameter was moved, cast, or replaced in the model."""
        self._watch.check_present()
        self._watch.check_memory()

    def restore_anywhere_(self) -> None:
        """Restores the weights like ``restore_``, also in a model that was moved or cast.

        Raises:
            ModelChangedError: if a masked parameter was replaced in the model.
        """
        self._watch.check_present()
        self._complete()
        self._written = None
        self._check_beside()
        for group in self._launch_groups:
            for p, start, stop in group.slot_ranges():
                live, values = p.live.detach().view(-1), group.master[start:stop]
                if p.layout is Layout.COMPACT:
                    live.copy_(values)
                    continue
                offsets = (self.mask.ids[p.start : p.stop] - p.base).to(live.device)
                with torch.inference_mode(live.is_inference()):  # it may have been cast within a closure
                    live.index_copy_(0, offsets, values.to(live.device, live.dtype))
        self._restored = True

    def _check_beside(self) -> None:
        """Raises ``ModelChangedError`` if another optimizer has taken the vectors beside frozen parameters."""
        for p in self._parameters():
            if p.layout is Layout.COMPACT:
                p.check_memory()

    def _parameters(self) -> list[MaskedParameter]:
        return sorted((p for group in self._launch_groups for p in group.parameters), key=lambda p: p.base)

    def _run(self, pass_: _Pass, *, restored: bool, updates: int = 0, check: bool = True) -> None:
        """Runs one pass over all launch groups, to its end even if an exception hits it.

        Args:
            pass_: the pass; it can be repeated.
            restored: whether the weights are ``cast(master)`` afterwards.
            updates: number of updates that the pass applies.
            check: whether to check first that the model is the same.
        """
        self._prepare_pass(check=check)
        self._unfinished = (pass_, restored, self.updates, self.updates + updates)
        try:
            for group in self._launch_groups:
                pass_(group, self.updates, False)
        except BaseException:
            self._complete()
            raise
        # No call in between: an exception finds all of it or nothing, and then the pass is repeated.
        self._unfinished, self._restored, self.updates = None, restored, self.updates + updates
        self._written = self.live() if self._debug else None

    def _prepare_pass(self, *, check: bool) -> None:
        """Checks that the model and, in debug mode, its weights are the same; completes an interrupted pass."""
        if check:
            self._watch.check_memory()
        self._complete()
        self._check_debug_copy()

    def _check_debug_copy(self) -> None:
        """In debug mode raises ``ModelChangedError``, once, if the live weights are not those of the last operation."""
        written, self._written = self._written, None
        if written is not None:
            live = self.live()
            changed = int(((live != written) & ~(live.isnan() & written.isnan())).sum())
            if changed:
                raise ModelChangedError(
                    f"something else, such as the closure, has written {changed} of the {len(self.mask)} masked "
                    f"weights within a step"
                )

    def _complete(self) -> None:
        """Completes the pass that an exception has hit, if any."""
        if self._unfinished is None:
            return
        pass_, restored, number, updates = self._unfinished
        self._written = None
        for group in self._launch_groups:
            pass_(group, number, True)
        self._unfinished, self._restored, self.updates = None, restored, updates


def _perturb_(group: LaunchGroup, seed: Tensor, scale: Tensor) -> None:
    group.backend.perturb_(group.table, group.master, group.to_device(seed), group.to_device(scale))


def _restore_(group: LaunchGroup) -> None:
    group.backend.restore_(group.table, group.master)


def _same_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compares two float32 tensors [n] bit for bit after a cast to ``dtype``: bool [n]."""
    int_dtype = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return a.to(dtype).view(int_dtype) == b.to(dtype).view(int_dtype)


__all__ = ["MaskedWeights", "round_fp32"]
