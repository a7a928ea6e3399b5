"""``RunConfig``: every setting of a run, checked; from defaults, a TOML file and the command line, in that order."""

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import tomli_w

from ...engine.backend import BACKENDS
from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.models import DTYPES
from ...engine.lm.objective import Objective
from ...engine.stream import check_seed
from ..aggregation import Aggregation, Rule, Weighting
from ..attack import Attack
from ..methods import Elements, Gradient, Method, Stopping
from ..partition import Partition
from ..privacy import Privacy
from ..selection import Thresholds
from ..terms import Schedule
from .task import chosen_task

# Settings that say where something is, or how it is computed, and may change while a run is stopped.
_PLACES = {"model", "data_dir", "data", "validation", "mask", "calibration", "device", "backend", "snapshot_every"}
_THRESHOLDS = ("vp_rho_later", "vp_rho_quie", "vp_sigma")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a run.

    Args:
        model: Hugging Face id, directory, GGUF file, or "embedded".
        task: name of the task, or "embedded".
        data_dir: holds TASK/{train,validation}.jsonl; None loads the hub's copy.
        data: JSON Lines of your own, in place of a task.
        validation: JSON Lines to evaluate on; None holds out a fifth of ``data``, chosen by the seed.
        template: the prompt for ``data``, with its fields in braces.
        labels: the label words for ``data``, separated by commas.
        label_field: the field of ``data`` that holds the class or the label word.
        cut: the field of ``data`` that is cut where a prompt is too long; None is the template's first one.
        method: which elements are trained, how, and which clients are stopped early.
        clients: ``K``.
        clients_per_round: how many of them take part in a round, sampled anew each time; 0 is all.
        rounds: ``R``.
        local_steps: ``T``, steps of a client in a round.
        partition: how examples are dealt to clients.
        alpha: concentration of the Dirichlet partition.
        client_field: the field that names the client of an example, for natural clients; None is the task's own.
        weighting: how ``p_i`` are made.
        aggregation: what is made of the clients' scalars of a step.
        trim: share that ``trimmed-mean`` cuts from each end, in (0, 0.5).
        clip: size to which scalars are cut before they are aggregated; 0 cuts none.
        max_scalar: size above which a scalar is refused, with the message it came in.
        max_examples: number of examples above which a client's claim is refused; 0 believes any.
        attack: what hostile clients do to their scalars, to see what becomes of the run.
        attackers: how many clients do it, the last ones.
        dp_noise: noise multiplier (sigma) of differentially private scalars, over the clip; 0 is no privacy.
        dp_clip: ``C``, what one example may change of a difference of losses.
        dp_delta: of (epsilon, delta).
        batch_size: examples of a step; with privacy, their expected number.
        micro_batch_size: examples of one forward pass; 0 is the whole batch.
        objective: the loss.
        lr: learning rate (eta) of the first step.
        schedule: how it falls over the run's steps.
        queries: perturbations of a step.
        eps: perturbation scale.
        density: ``u`` in (0, 1], share of the elements that the mask holds.
        mask: a mask file instead of calibration.
        calibration: JSON Lines with the field ``text``.
        calibration_texts: how many of them.
        calibration_batch_size: texts of one gradient.
        calibration_length: tokens of a text, at most.
        max_length: tokens of a prompt and its answer, at most.
        layer: of ``layer-zo``: dotted name of a module, or empty for the transformer block with the largest gradient.
        lora_rank: of ``lora-fedzo``.
        lora_alpha: its scale is ``lora_alpha / lora_rank``.
        lora_targets: its modules, separated by commas; empty for those usual for the architecture.
        vp_steps: ``T_cali``, steps of the path by which ``meerkat-vp`` judges a client.
        vp_initial: its first steps that are compared with its last ones.
        vp_later: its last steps.
        vp_rho_later: threshold of ``rho_later``; this and the next two are all given or none.
        vp_rho_quie: threshold of ``rho_quie``.
        vp_sigma: ``|GradIP|`` below which a step is quiet.
        vp_null_paths: paths on held-out examples that give the thresholds where they are not given.
        eval_every: rounds between evaluations; 0 evaluates before and after only.
        eval_examples: validation examples, from the first on; 0 is all.
        snapshot_every: rounds between snapshots, from which a run that was stopped goes on; 0 takes none.
        seed: root seed in [0, 2**64).
        device: cpu or cuda.
        dtype: of the weights.
        backend: auto, torch, numba or triton.
    """

    model: str = embedded.NAME
    task: str = embedded.NAME
    data_dir: Path | None = None
    data: Path | None = None
    validation: Path | None = None
    template: str | None = None
    labels: str | None = None
    label_field: str = "label"
    cut: str | None = None
    method: Method = Method.MEERKAT
    clients: int = 4
    clients_per_round: int = 0
    rounds: int = 20
    local_steps: int = 10
    partition: Partition = Partition.IID
    alpha: float = 0.5
    client_field: str | None = None
    weighting: Weighting = Weighting.EXAMPLES
    aggregation: Rule = Rule.MEAN
    trim: float = 0.2
    clip: float = 0.0
    max_scalar: float = 1e8
    max_examples: int = 0
    attack: Attack = Attack.NONE
    attackers: int = 0
    dp_noise: float = 0.0
    dp_clip: float = 0.02
    dp_delta: float = 1e-5
    batch_size: int = 16
    micro_batch_size: int = 0
    objective: Objective = Objective.CANDIDATES
    lr: float = 1e-4
    schedule: Schedule = Schedule.CONSTANT
    queries: int = 1
    eps: float = 1e-3
    density: float = 1e-3
    mask: Path | None = None
    calibration: Path | None = None
    calibration_texts: int = 64
    calibration_batch_size: int = 4
    calibration_length: int = 256
    max_length: int = 256
    layer: str = ""
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: str = ""
    vp_steps: int = 100
    vp_initial: int = 20
    vp_later: int = 50
    vp_rho_later: float | None = None
    vp_rho_quie: float | None = None
    vp_sigma: float | None = None
    vp_null_paths: int = 4
    eval_every: int = 0
    eval_examples: int = 0
    snapshot_every: int = 10
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"

    def __post_init__(self) -> None:
        chosen_task(self)
        for name in ("clients", "rounds", "local_steps", "batch_size", "queries", "calibration_texts",
                     "calibration_batch_size", "calibration_length", "max_length", "lora_rank", "lora_alpha",
                     "vp_initial", "vp_later"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_every", "eval_examples", "snapshot_every", "micro_batch_size", "max_examples"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("eps", "alpha", "max_scalar"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "finite and positive")
        _require(0 <= self.lr < math.inf, "lr", self.lr, "finite and not negative")
        _require(0 < self.density <= 1, "density", self.density, "in (0, 1]")
        _require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(0 <= self.clients_per_round <= self.clients, "clients_per_round", self.clients_per_round,
                 f"0 (all) to the {self.clients} clients")  # fmt: skip
        self._check_method()
        self._check_privacy()
        self._check_aggregation()
        try:
            check_seed(self.seed)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    def _check_method(self) -> None:
        recipe = self.method.recipe
        if self.mask is not None and not recipe.elements.ranked:
            raise ConfigError(f"{self.method} trains {recipe.elements} elements; leave the mask file out")
        windows = max(self.vp_initial, self.vp_later)
        if recipe.stopping is not Stopping.NONE:
            longest = f"at least the {windows} steps of a window (vp_initial, vp_later)"
            _require(self.vp_steps >= windows, "vp_steps", self.vp_steps, longest)
        _require(self.vp_null_paths >= 3, "vp_null_paths", self.vp_null_paths, "at least 3")
        given = [name for name in _THRESHOLDS if getattr(self, name) is not None]
        for name in given:
            most = 1 if name == "vp_rho_quie" else math.inf
            _require(0 <= getattr(self, name) <= most and math.isfinite(getattr(self, name)), name, getattr(self, name),
                     "in [0, 1]" if most == 1 else "finite and not negative")  # fmt: skip
        for name, elements in (("layer", Elements.LAYER), ("lora_targets", Elements.LORA)):
            if getattr(self, name) and recipe.elements is not elements:
                raise ConfigError(f"{name} has no meaning for {self.method}, which trains {recipe.elements} elements")
        if given and len(given) < len(_THRESHOLDS):
            raise ConfigError(f"{', '.join(_THRESHOLDS)} go together; only {', '.join(given)} given")
        if self.queries > 1 and recipe.gradient is Gradient.BACKPROPAGATION:
            raise ConfigError(f"{self.method} draws no perturbations; leave queries out")

    def _check_aggregation(self) -> None:
        how, participants = self.how_aggregated(), self.clients_per_round or self.clients
        if self.method.recipe.gradient is Gradient.BACKPROPAGATION:
            for name, plain in (("aggregation", Rule.MEAN), ("clip", 0.0), ("attack", Attack.NONE)):
                if getattr(self, name) != plain:
                    raise ConfigError(f"{name} is about scalars, and {self.method} sends weights; leave it out")
        if how.rule is Rule.TRIMMED_MEAN and not how.cut(participants):
            raise ConfigError(
                f"trimmed-mean with trim {self.trim:g} of {participants} clients a round cuts none "
                f"(floor({self.trim:g} * {participants}) = 0); raise trim or the number of clients"
            )
        most = float(np.finfo(np.float32).max)
        if self.lr * self.max_scalar > most:
            raise ConfigError(
                f"lr {self.lr:g} times max_scalar {self.max_scalar:g} is more than fp32 holds; lower max_scalar"
            )
        _require(0 <= self.attackers < self.clients, "attackers", self.attackers,
                 f"0 to {self.clients - 1}, fewer than the clients")  # fmt: skip
        if (self.attackers > 0) != (self.attack is not Attack.NONE):
            raise ConfigError(f"attack and attackers go together, got {self.attack} and {self.attackers}")

    def privacy(self) -> Privacy | None:
        """What the scalars keep of a client's examples."""
        if not self.dp_noise:
            return None
        return Privacy(
            clip=self.dp_clip, noise_multiplier=self.dp_noise, delta=self.dp_delta, batch_size=self.batch_size
        )

    def _check_privacy(self) -> None:
        recipe = self.method.recipe
        _require(0 <= self.dp_noise < math.inf, "dp_noise", self.dp_noise, "finite and not negative (0: no privacy)")
        if self.privacy() is None:
            for name in ("dp_clip", "dp_delta"):
                if getattr(self, name) != getattr(RunConfig, name):
                    raise ConfigError(f"{name} protects nobody without noise; give dp_noise too, or leave it out")
            return
        if recipe.gradient is Gradient.BACKPROPAGATION:
            raise ConfigError(f"{self.method} sends weights, which dp_noise does not make private; leave it out")
        if recipe.elements is Elements.TASK:
            raise ConfigError(
                f"{self.method} chooses its elements by gradients of the clients' examples, which dp_noise does not "
                f"make private; take another method, or leave it out"
            )

    def how_aggregated(self) -> Aggregation:
        """How a round is made of the clients' answers."""
        return Aggregation(rule=self.aggregation, weighting=self.weighting, trim=self.trim, clip=self.clip)

    def digest(self) -> str:
        """SHA-256 of the settings that a run's bits depend on; what is read is known by what is in it."""
        kept = {name: str(value) for name, value in dataclasses.asdict(self).items() if name not in _PLACES}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def vp_thresholds(self) -> Thresholds | None:
        """The thresholds of virtual-path selection, where they are given."""
        if self.vp_rho_later is None or self.vp_rho_quie is None or self.vp_sigma is None:
            return None
        return Thresholds(rho_later=self.vp_rho_later, rho_quie=self.vp_rho_quie, sigma=self.vp_sigma)

    def to_toml(self) -> str:
        """The settings as TOML; unset ones are left out."""
        plain = {}
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not (name == "task" and self.data is not None):
                plain[name] = str(value) if isinstance(value, (Path, StrEnum)) else value
        convention = f"# partition: {self.partition.describe(self.alpha)}\n"
        return convention + tomli_w.dumps(plain)


# What a run without --model and --task uses where nothing else is said: tuned to the embedded model's size.
_EMBEDDED = {
    "partition": Partition.DIRICHLET,
    "rounds": 30,
    "local_steps": 5,
    "lr": 1e-2,
    "density": 1e-2,
    "calibration_texts": 256,
    "calibration_batch_size": 16,
    "calibration_length": 128,
    "eval_every": 5,
}
# What a method uses where nothing else is said.
_OF_METHOD: dict[Method, dict[str, Any]] = {Method.DECOMFL: {"queries": 5}}
# And with the embedded model: the learning rates were tuned on its held-out examples.
_EMBEDDED_OF_METHOD: dict[Method, dict[str, Any]] = {
    Method.FULL_FEDZO: {"lr": 1e-3},
    Method.DECOMFL: {"lr": 3e-3},
    Method.WEIGHT_MAGNITUDE: {"lr": 1e-1},
    Method.RANDOM_MASK: {"lr": 1e-1},
    Method.FEDAVG: {"lr": 1e-1},
}


def make_config(*layers: Mapping[str, Any]) -> RunConfig:
    """The settings from some layers, later ones first in rank.

    Args:
        layers: setting names and values; strings are converted to paths and choices.

    Raises:
        ConfigError: for a name that is no setting, or a value that does not fit.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given |= layer
    if {"data", "task"} <= given.keys():
        raise ConfigError("give --task or --data, not both: data of your own are a task of their own")
    method = _converted("method", given.get("method", Method.MEERKAT), Method)
    given = _OF_METHOD.get(method, {}) | given
    if given.get("model", embedded.NAME) == embedded.NAME and given.get("task", embedded.NAME) in embedded.TASKS:
        given = _EMBEDDED | _EMBEDDED_OF_METHOD.get(method, {}) | given
    return RunConfig(**as_settings(given))


def as_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as ``RunConfig`` has them; raises ``ConfigError`` for a name that is no setting, or an unfit value."""
    hints = get_type_hints(RunConfig)
    for name in given:
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(sorted(hints))}")
    return {name: _converted(name, value, hints[name]) for name, value in given.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; raises ``ConfigError`` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error


def _converted(name: str, value: Any, kind: Any) -> Any:
    kinds = [each for each in get_args(kind) or (kind,) if each is not type(None)]
    wanted = kinds[0]
    if isinstance(value, bool) and wanted is not bool:
        raise ConfigError(f"{name} must be {wanted.__name__}, got {value}")
    if isinstance(value, wanted):
        return value
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted is float and isinstance(value, int):
        return float(value)
    if issubclass(wanted, StrEnum) and isinstance(value, str):
        try:
            return wanted(value)
        except ValueError:
            raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(wanted)}") from None
    raise ConfigError(f"{name} must be {wanted.__name__}, got {value!r}")


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value}")


__all__ = ["RunConfig", "as_settings", "make_config", "read_toml"]
