"""``RunConfig``: all settings of a run, in sections. ``make_config`` builds one from flat names and values."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...engine.errors import ConfigError
from ...engine.lm.data import AnyTask
from ...engine.lm.free_text.task import TextTask
from ...engine.lm.objective import Objective
from ...engine.lm.quantize import Quantize
from ...engine.stream import check_seed
from ...engine.two_points import PointsMode
from ..aggregation import Rule, StoppedWeight
from ..attack import Attack
from ..methods import Elements, Gradient, Method, Stopping
from ..privacy import Privacy
from ..selection import MIN_CLIENTS, NullPaths
from .presets import preset
from .sections import (
    AggregationConfig,
    AttackConfig,
    ClientsConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    MaskConfig,
    MaskedWeightsMode,
    ModelConfig,
    PrivacyConfig,
    SelectionConfig,
    StepConfig,
)
from .settings import Checked, Setting, setting, settings_of
from .task import choose_task

# Settings that locate inputs or choose how something is computed. They may change while a run is stopped.
_NOT_IN_DIGEST = {
    "model",
    "data_dir",
    "data",
    "validation",
    "chat_template",
    "mask",
    "calibration",
    "calibration_elements",
    "device",
    "backend",
    "capture",
    "offload",
    "snapshot_every",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """All settings of a run. ``SETTINGS`` lists them by their flat names.

    Raises:
        ConfigError: if two settings do not fit together. Each section checks its own values.
    """

    method: Method = setting(Method.MEERKAT, "training method: " + ", ".join(Method))
    rounds: int = setting(20, "number of rounds R")
    local_steps: int = setting(10, "number of local steps T of a client in a round")
    seed: int = setting(0, "root seed, in [0, 2**64)")
    snapshot_every: int = setting(
        10, "number of rounds between snapshots, which make --resume faster; 4 bytes a trained element; 0: none"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    step: StepConfig = field(default_factory=StepConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        choose_task(self.data, self.clients, self.model.source)
        self._check_objective()
        for name in ("rounds", "local_steps"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.snapshot_every >= 0, "snapshot_every", "0 or more")
        self._check_method()
        self._check_points()
        self._check_privacy()
        self._check_aggregation()
        try:
            check_seed(self.seed)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    @property
    def task(self) -> AnyTask:
        """The task of the run."""
        return choose_task(self.data, self.clients, self.model.source)

    @property
    def objective(self) -> Objective:
        """The loss of a step: the one that was set, or the one that suits the task."""
        if self.step.objective is not None:
            return self.step.objective
        return Objective.LANGUAGE_MODEL if isinstance(self.task, TextTask) else Objective.CANDIDATES

    def private_terms(self) -> Privacy | None:
        """The privacy parameters of the clients' scalars; None if these are not private."""
        return self.privacy.build(self.step.batch_size)

    def flat(self) -> dict[str, Any]:
        """The values of all settings by their flat names."""
        return {
            option: getattr(getattr(self, setting.section) if setting.section else self, setting.name)
            for option, setting in SETTINGS.items()
        }

    def as_given(self) -> dict[str, Any]:
        """The values, by flat names, from which ``make_config`` makes these settings: without ``task`` for own data."""
        return {name: value for name, value in self.flat().items() if name != "task" or not self.data.is_own}

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy of the settings with some changed. Presets are not applied again.

        Args:
            changes: new values by flat names.

        Raises:
            ConfigError: see ``make_config``.
        """
        return _from_flat(self.flat() | changes)

    def on_task(self, task: str) -> "RunConfig":
        """A copy of the settings with another task. With the user's own data, only their task is possible.

        Args:
            task: name of the task.

        Raises:
            ConfigError: if the task is unknown or does not fit the model, or if the run uses the user's own data and
                the task is another one.
        """
        if not self.data.is_own:
            return self.replace(task=task)
        if task != self.task.name:
            raise ConfigError(f"with your own data the only task is {self.task.name!r}, their name; got {task!r}")
        return self

    def digest(self) -> str:
        """SHA-256 of the settings that a run's bits depend on. Other digests cover the contents of input files."""
        values = {name: str(value) for name, value in self.flat().items() if name not in _NOT_IN_DIGEST}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _check_objective(self) -> None:
        if not isinstance(self.task, TextTask):
            if self.evaluation.metrics:
                raise ConfigError(
                    f"metrics compare generated answers, and {self.task.name!r} chooses between label words"
                )
        elif self.step.objective is Objective.CANDIDATES:
            raise ConfigError(
                f"objective candidates is for a choice between label words, and {self.task.name!r} is free text; use "
                f"language-model, or leave it out"
            )

    def _check_method(self) -> None:
        recipe, selection = self.method.recipe, self.selection
        if self.mask.file is not None and not recipe.elements.uses_density:
            raise ConfigError(f"{self.method} trains {recipe.elements} elements; leave the mask file out")
        windows = max(selection.initial, selection.later)
        if recipe.stopping is not Stopping.NONE and selection.steps < windows:
            raise ConfigError(
                f"vp_steps must be at least the {windows} steps of a window (the larger of vp_initial and vp_later), "
                f"got {selection.steps}"
            )
        of_clients = selection.null is NullPaths.CLIENTS and selection.thresholds() is None
        if recipe.stopping is not Stopping.NONE and of_clients and self.clients.count < MIN_CLIENTS:
            raise ConfigError(f"vp_null clients needs at least {MIN_CLIENTS} clients, got {self.clients.count}")
        for name, value, elements in (
            ("layer", self.mask.layer, Elements.LAYER),
            ("lora_targets", self.lora.targets, Elements.LORA),
        ):
            if value and recipe.elements is not elements:
                raise ConfigError(f"{name} has no meaning for {self.method}, which trains {recipe.elements} elements")
        if self.mask.elements and recipe.elements not in (Elements.SENSITIVITY, Elements.TASK):
            raise ConfigError(
                f"calibration_elements bounds the memory of a mask by gradients, and {self.method} trains "
                f"{recipe.elements} elements; leave it out"
            )
        if self.step.queries > 1 and recipe.sends_weights:
            raise ConfigError(f"{self.method} draws no perturbations; leave queries out")
        if self.step.queries < recipe.gradient.least_queries:
            raise ConfigError(
                f"{self.method} divides by the deviation of a step's losses; queries must be at least "
                f"{recipe.gradient.least_queries}, got {self.step.queries}"
            )

    def _check_points(self) -> None:
        if self.method.recipe.sends_weights and self.model.masked_weights is MaskedWeightsMode.ADD:
            raise ConfigError(f"{self.method} trains by backpropagation, where masked weights are written; give write")
        if self.step.points is not PointsMode.TOGETHER:
            return
        if self.model.quantize is Quantize.NONE:
            raise ConfigError("points together need read-only weights; give --quantize (as-stored, nf4, ...)")
        if self.method.recipe.gradient is not Gradient.TWO_POINT:
            raise ConfigError(f"{self.method} has no two points to compute together; leave --points out")

    def _check_aggregation(self) -> None:
        aggregation, participants = self.aggregation.build(), self.clients.participants
        if self.method.recipe.sends_weights:
            for name, value, default in (
                ("aggregation", aggregation.rule, Rule.MEAN),
                ("clip", aggregation.clip, 0.0),
                ("attack", self.attack.kind, Attack.NONE),
            ):
                if value != default:
                    raise ConfigError(f"{name} is about scalars, and {self.method} sends weights; leave it out")
        if aggregation.rule is Rule.TRIMMED_MEAN and not aggregation.cut(participants):
            raise ConfigError(
                f"trimmed-mean with trim {aggregation.trim:g} of {participants} clients a round cuts none "
                f"(floor({aggregation.trim:g} * {participants}) = 0); raise trim or the number of clients"
            )
        if aggregation.stopped_weight is not StoppedWeight.KEEP and self.method.recipe.stopping is Stopping.NONE:
            raise ConfigError(f"stopped_weight has no meaning for {self.method}, which stops no client; leave it out")
        lr, max_scalar = self.step.lr, self.aggregation.max_scalar
        if lr * max_scalar > float(np.finfo(np.float32).max):
            raise ConfigError(f"lr {lr:g} times max_scalar {max_scalar:g} is more than fp32 holds; lower max_scalar")
        if not 0 <= self.attack.clients < self.clients.count:
            raise ConfigError(
                f"attackers must be 0 to {self.clients.count - 1}, fewer than the clients, got {self.attack.clients}"
            )

    def _check_privacy(self) -> None:
        recipe = self.method.recipe
        if self.private_terms() is None:
            return
        if recipe.sends_weights:
            raise ConfigError(f"{self.method} sends weights, which dp_noise does not make private; leave dp_noise out")
        if recipe.elements is Elements.TASK:
            raise ConfigError(
                f"{self.method} chooses its elements by gradients of the clients' examples, which dp_noise does not "
                f"make private; use another method, or leave dp_noise out"
            )


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "clients": ClientsConfig,
    "step": StepConfig,
    "mask": MaskConfig,
    "lora": LoraConfig,
    "selection": SelectionConfig,
    "aggregation": AggregationConfig,
    "privacy": PrivacyConfig,
    "attack": AttackConfig,
    "evaluation": EvaluationConfig,
}

# All settings by their flat names, section by section.
SETTINGS: dict[str, Setting] = {
    setting.option: setting
    for section, section_class in (("", RunConfig), *_SECTIONS.items())
    for setting in settings_of(section, section_class)
}


def make_config(*layers: Mapping[str, Any]) -> RunConfig:
    """Builds the settings of a run.

    Args:
        layers: values by flat names; a later layer overrides an earlier one. Strings are converted to paths and
            choices. A setting in no layer gets its value from the preset of the method or of the embedded model, else
            its default.

    Raises:
        ConfigError: if a name is no setting, a value does not fit, or two settings do not fit together.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given |= layer
    if "task" in given and given.keys() & {"data", "dataset"}:
        raise ConfigError("give --task or --data, not both: your own data are a task by themselves")
    if given.keys() & {"data", "dataset"} and "model" not in given:
        raise ConfigError(
            "--data and --dataset need --model; the embedded model only knows the words of its own texts, and takes "
            "others with --model embedded"
        )
    method = SETTINGS["method"].convert(given.get("method", Method.MEERKAT))
    return _from_flat(preset(method, given) | given)


def convert(given: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values, by flat names, to the types of ``RunConfig``.

    Raises:
        ConfigError: if a name is no setting, or a value does not fit.
    """
    for name in given:
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(sorted(SETTINGS))}")
    return {name: SETTINGS[name].convert(value) for name, value in given.items()}


def _from_flat(given: Mapping[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {section: {} for section in ("", *_SECTIONS)}
    for option, value in convert(given).items():
        values[SETTINGS[option].section][SETTINGS[option].name] = value
    sections = {section: section_class(**values[section]) for section, section_class in _SECTIONS.items()}
    return RunConfig(**values[""], **sections)


__all__ = ["SETTINGS", "RunConfig", "convert", "make_config"]
