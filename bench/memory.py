"""Memory and time of steps with base weights kept in several formats: one process for each format's memory."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.errors import MeerkatError
from ..engine.frozen.weight import frozen_weights
from ..engine.lm.causal import causal_lm
from ..engine.lm.models import DTYPES, load_model
from ..engine.lm.quantize import Offload, Quantize, freeze_base, quantizable
from ..engine.mask import SparseMask
from ..engine.optimizer import SparseZO
from ..engine.parameters import floating_parameters
from ..engine.two_points import PointsMode
from .measure import peak_bytes
from .shapes import SHAPES, build

_EPS, _LR, _SEED = 1e-3, 1e-5, 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model whose base weights are kept in some way, and a batch.

    Args:
        model: name of a shape, which gets random weights in bfloat16, or a model as ``load_model`` takes it.
        quantize: how the weights are kept.
        dtype: name of the dtype that the model computes in.
        device: device that computes.
        offload: where read-only weights are.
        adds: whether masked weights are added to outputs.
        points: how the two points of a step are computed.
        density: share of the elements that are masked, at random.
        rows: sequences of the batch.
        length: tokens of each.
        layers: number of transformer blocks of a shape that are made; 0: all.
    """

    model: str
    quantize: str = Quantize.NONE
    dtype: str = "float32"
    device: str = "cpu"
    offload: str = Offload.NONE
    adds: bool = False
    points: str = PointsMode.SEPARATE
    density: float = 1e-3
    rows: int = 16
    length: int = 20
    layers: int = 0

    @property
    def name(self) -> str:
        """Name of the case in a table."""
        words = [f"in place, {self.dtype}" if self.quantize == Quantize.NONE else f"{self.quantize}, {self.dtype}"]
        words += ["masked weights added"] if self.adds else []
        words += [f"offloaded to {self.offload}"] if self.offload != Offload.NONE else []
        words += ["both points in one pass"] if self.points == PointsMode.TOGETHER else []
        return ", ".join(words)

    def load(self) -> nn.Module:
        """Makes the model, with frozen parameters."""
        dtype, device, kind = DTYPES[self.dtype], torch.device(self.device), Quantize(self.quantize)
        if self.model not in SHAPES:
            options: dict[str, Any] = {"quantize": kind, "offload": Offload(self.offload), "adds": self.adds}
            model = load_model(self.model, dtype, device, **options).model
        elif kind is Quantize.NONE:
            model = build(self.model, dtype, device, self.layers or None)
        else:
            model = build(self.model, torch.bfloat16, torch.device("cpu"), self.layers or None)
            freeze_base(model, kind, dtype, device, offload=Offload(self.offload), adds=self.adds)
        return model.requires_grad_(False)

    def optimizer(self, model: nn.Module) -> SparseZO:
        """An optimizer of the model's masked elements."""
        mask = SparseMask.random(model, self.density, _SEED, frozen=True)
        return SparseZO(model, mask, lr=_LR, eps=_EPS, points=self.points, frozen=True)

    def loss(self, model: nn.Module) -> Callable[[], Tensor]:
        """A loss of the batch: the head is computed at the last token of each sequence, as for label words."""
        lm = cast(Any, causal_lm(model))
        decoder, head = lm.get_decoder(), lm.get_output_embeddings()
        ids = torch.arange(self.rows * self.length, device=self.device).view(self.rows, self.length) % 1000 + 3

        def loss() -> Tensor:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            return cast(Tensor, head(hidden).float().logsumexp(-1).mean())

        return loss


def measure_memory(case: Case) -> dict[str, Any]:
    """Measures the memory of a step. For a process of its own.

    Returns:
        Bytes: "base" of the stored weights, of which "mapped" from files; "masked" beside them; "step", the largest
        amount that a step allocates; "layer" of the largest dense weight; "process", how much the process has more,
        without mapped files, than before the model was made; "device_peak" on a GPU. Numbers: "elements",
        "masked_elements".
    """
    device, before = torch.device(case.device), _anonymous()
    model = case.load()
    optimizer, loss = case.optimizer(model), case.loss(model)
    frozen = frozen_weights(model)
    stored = [tensor for weight in frozen.values() for tensor in weight.stored.tensors]
    plain = [p for _, p in floating_parameters(model) if p not in set(frozen.values())]
    optimizer.step(loss)  # workspaces of libraries
    step = peak_bytes(lambda: optimizer.step(loss), device)
    result = {
        "base": sum(tensor.nbytes for tensor in [*stored, *plain]),
        "mapped": sum(tensor.nbytes for tensor in stored if _is_mapped(tensor)),
        "masked": _masked_bytes(optimizer),
        "step": step,
        "layer": max((p.numel() * p.element_size() for _, p in floating_parameters(model)), default=0),
        "process": _anonymous() - before,
        "elements": sum(p.numel() for _, p in floating_parameters(model)),
        "masked_elements": len(optimizer.weights.mask),
    }
    if device.type == "cuda":
        result["device_peak"] = torch.cuda.max_memory_allocated(device)
    return result


def _masked_bytes(optimizer: SparseZO) -> int:
    """Bytes of masters, offsets, live values and corrections of the masked elements."""
    tables, masters = optimizer.weights.tables(), optimizer.weights.saved()
    own = sum(t.nbytes for table in tables for t in (table.offsets, table.blocks) if t is not None)
    beside = [
        t.nbytes
        for weight in frozen_weights(optimizer._model).values()
        for t in (weight.offsets, weight.values)
        if t is not None
    ]
    corrections = [w._correction.nbytes for w in frozen_weights(optimizer._model).values() if w._correction is not None]
    return own + sum(master.nbytes for master in masters) + sum(beside) + sum(corrections)


def computed_bytes(case: Case) -> dict[str, int]:
    """Bytes of the stored weights of a shape with all its layers, by its parameters' sizes, and of one dense weight.

    Returns:
        "base", "layer", "elements", "masked_elements" as in ``measure_memory``.
    """
    kind, width = Quantize(case.quantize), DTYPES[case.dtype].itemsize
    model = build(case.model, torch.bfloat16, torch.device("meta"))
    linear = quantizable(model) if kind not in (Quantize.NONE, Quantize.AS_STORED) else frozenset()
    base = sum(
        _quantized_bytes(kind, p) if name in linear else p.numel() * (width if kind is Quantize.NONE else 2)
        for name, p in floating_parameters(model)
    )
    sizes = [p.numel() for _, p in floating_parameters(model)]
    return {
        "base": base,
        "layer": max(sizes) * width,
        "elements": sum(sizes),
        "masked_elements": round(case.density * sum(sizes)),
    }


def _quantized_bytes(kind: Quantize, matrix: Tensor) -> int:
    if kind is Quantize.NF4:
        return matrix.numel() // 2 + 4 * -(-matrix.numel() // 64) + 4 * 16  # blocks, their scales, and the 16 levels
    return matrix.numel() + 4 * matrix.shape[0]


def in_own_process(case: Case) -> dict[str, Any]:
    """Runs ``measure_memory`` in a process of its own; a case that fails has its reason under "failed"."""
    command = [sys.executable, "-m", "meerkat_engine.bench.memory", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def measure_times(case: Case, plain: Case, repeats: int) -> dict[str, float]:
    """Times steps of a case and of plain weights in turn.

    Args:
        case: the case.
        plain: the same model and batch with weights in place.
        repeats: number of steps of each.

    Returns:
        Medians: "over_forwards", time of a step over its two forward passes, each by itself; "over_plain", time of a
        step over that of the plain weights; "seconds" of a step.
    """
    runs = []
    for each in (plain, case):
        model = each.load()
        optimizer, loss = each.optimizer(model), each.loss(model)
        runs.append((lambda optimizer=optimizer, loss=loss: optimizer.step(loss), loss))
    seconds: dict[str, list[float]] = {"plain": [], "step": [], "forwards": []}
    for _ in range(repeats + 1):
        seconds["plain"].append(_seconds(runs[0][0], case.device))
        seconds["step"].append(_seconds(runs[1][0], case.device))
        with torch.inference_mode():
            seconds["forwards"].append(2 * _seconds(runs[1][1], case.device))
    medians = {name: float(torch.tensor(values[1:], device="cpu").median()) for name, values in seconds.items()}
    return {
        "seconds": medians["step"],
        "over_forwards": medians["step"] / medians["forwards"],
        "over_plain": medians["step"] / medians["plain"],
    }


def _seconds(action: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cases(model: str, device: str, rows: int, length: int, layers: int = 0, dtype: str | None = None) -> Iterator[Case]:
    """All cases of a model on a device.

    Args:
        model: see ``Case``.
        device: see ``Case``.
        rows: see ``Case``.
        length: see ``Case``.
        layers: see ``Case``.
        dtype: what models with read-only weights compute in; None: bfloat16 on a GPU, else float32.
    """
    narrow = dtype or ("bfloat16" if device == "cuda" else "float32")
    common: dict[str, Any] = {"model": model, "device": device, "rows": rows, "length": length,
                              "layers": layers}  # fmt: skip
    yield Case(**common, dtype="float32")
    yield Case(**common, dtype="bfloat16")
    for kind in (Quantize.AS_STORED, Quantize.INT8, Quantize.NF4):
        yield Case(**common, quantize=kind, dtype=narrow)
        yield Case(**common, quantize=kind, dtype=narrow, points=PointsMode.TOGETHER)
    for kind in (Quantize.AS_STORED, Quantize.NF4):
        yield Case(**common, quantize=kind, dtype="bfloat16", adds=True)
    if device == "cuda":
        for kind in (Quantize.AS_STORED, Quantize.NF4):
            offloaded: dict[str, Any] = {"offload": Offload.CPU, "points": PointsMode.TOGETHER}
            yield Case(**common, quantize=kind, dtype=narrow, **offloaded)


def _anonymous() -> int:
    """Bytes of this process's memory without pages of files; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _is_mapped(tensor: Tensor) -> bool:
    """Whether the values of a tensor on the CPU are a file's pages."""
    if tensor.device.type != "cpu" or not tensor.nbytes:
        return False
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= address < end:
            return inode != "0"
    return False


if __name__ == "__main__":
    try:
        print(json.dumps(measure_memory(Case(**json.loads(sys.argv[1])))))
    except MeerkatError as error:
        sys.exit(f"{type(error).__name__}: {error}")


__all__ = ["Case", "cases", "computed_bytes", "in_own_process", "measure_memory", "measure_times"]
