"""``RunConfig``: all settings of a run, in sections; and ``make_config``, which makes one of flat names and values."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...engine.errors import ConfigError
from ...engine.lm.tasks import Task
from ...engine.stream import check_seed
from ..aggregation import Rule
from ..attack import Attack
from ..methods import Elements, Method, Stopping
from ..privacy import Privacy
from .presets import preset
from .sections import (
    AggregationConfig,
    AttackConfig,
    ClientsConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    MaskConfig,
    ModelConfig,
    PrivacyConfig,
    SelectionConfig,
    StepConfig,
)
from .settings import Checked, Setting, setting, settings_of
from .task import choose_task

# Settings that say where something is, or how it is computed, and may change while a run is stopped.
_PLACES = {"model", "data_dir", "data", "validation", "mask", "calibration", "device", "backend", "snapshot_every"}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Settings of a run. ``SETTINGS`` has them all by their flat names.

    Raises:
        ConfigError: if two of them do not go together; see the sections for each on its own.
    """

    method: Method = setting(Method.MEERKAT, "one of " + ", ".join(Method))
    rounds: int = setting(20, "number of rounds R")
    local_steps: int = setting(10, "local steps T of a client in a round")
    seed: int = setting(0, "root seed, in [0, 2**64)")
    snapshot_every: int = setting(10, "rounds between snapshots for --resume; 0: none, it replays the ledger")
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
        for name in ("rounds", "local_steps"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.snapshot_every >= 0, "snapshot_every", "0 or more")
        self._check_method()
        self._check_privacy()
        self._check_aggregation()
        try:
            check_seed(self.seed)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    @property
    def task(self) -> Task:
        """The task that the settings mean."""
        return choose_task(self.data, self.clients, self.model.source)

    def private_terms(self) -> Privacy | None:
        """The privacy of the clients' scalars; None if they are not private."""
        return self.privacy.build(self.step.batch_size)

    def flat(self) -> dict[str, Any]:
        """Every setting's value by its flat name."""
        return {
            name: getattr(getattr(self, each.section) if each.section else self, each.name)
            for name, each in SETTINGS.items()
        }

    def replace(self, **changes: Any) -> "RunConfig":
        """The same settings but for some, given by their flat names.

        Raises:
            ConfigError: as ``make_config``; nothing is taken from presets.
        """
        return _from_flat(self.flat() | changes)

    def on_task(self, task: str) -> "RunConfig":
        """The settings with another task; data of the user's own are the only task of theirs.

        Raises:
            ConfigError: if the task is unknown, does not fit the model, or is not the user's own data.
        """
        if self.data.file is None:
            return self.replace(task=task)
        if task != self.task.name:
            raise ConfigError(f"with --data the task is {self.task.name!r}, after the file; got {task!r}")
        return self

    def digest(self) -> str:
        """SHA-256 of the settings that a run's bits depend on; files count by their content, elsewhere."""
        kept = {name: str(value) for name, value in self.flat().items() if name not in _PLACES}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def _check_method(self) -> None:
        recipe, selection = self.method.recipe, self.selection
        if self.mask.file is not None and not recipe.elements.ranked:
            raise ConfigError(f"{self.method} trains {recipe.elements} elements; leave the mask file out")
        windows = max(selection.initial, selection.later)
        if recipe.stopping is not Stopping.NONE and selection.steps < windows:
            raise ConfigError(
                f"vp_steps must be at least the {windows} steps of a window (vp_initial, vp_later), got "
                f"{selection.steps}"
            )
        for name, value, elements in (
            ("layer", self.mask.layer, Elements.LAYER),
            ("lora_targets", self.lora.targets, Elements.LORA),
        ):
            if value and recipe.elements is not elements:
                raise ConfigError(f"{name} has no meaning for {self.method}, which trains {recipe.elements} elements")
        if self.step.queries > 1 and recipe.sends_weights:
            raise ConfigError(f"{self.method} draws no perturbations; leave queries out")

    def _check_aggregation(self) -> None:
        how, participants = self.aggregation.build(), self.clients.participants
        if self.method.recipe.sends_weights:
            for name, value, plain in (
                ("aggregation", how.rule, Rule.MEAN),
                ("clip", how.clip, 0.0),
                ("attack", self.attack.kind, Attack.NONE),
            ):
                if value != plain:
                    raise ConfigError(f"{name} is about scalars, and {self.method} sends weights; leave it out")
        if how.rule is Rule.TRIMMED_MEAN and not how.cut(participants):
            raise ConfigError(
                f"trimmed-mean with trim {how.trim:g} of {participants} clients a round cuts none "
                f"(floor({how.trim:g} * {participants}) = 0); raise trim or the number of clients"
            )
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
            raise ConfigError(f"{self.method} sends weights, which dp_noise does not make private; leave it out")
        if recipe.elements is Elements.TASK:
            raise ConfigError(
                f"{self.method} chooses its elements by gradients of the clients' examples, which dp_noise does not "
                f"make private; take another method, or leave it out"
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

# Every setting by its flat name, section by section.
SETTINGS: dict[str, Setting] = {
    each.option: each for section, kind in (("", RunConfig), *_SECTIONS.items()) for each in settings_of(section, kind)
}


def make_config(*layers: Mapping[str, Any]) -> RunConfig:
    """The settings of a run from some layers of flat names and values; a later layer goes before an earlier one.

    Args:
        layers: strings are converted to paths and choices. Where none of them says anything, a preset of the method and
            of the embedded model does, and then the defaults.

    Raises:
        ConfigError: for a name that is no setting, or a value that does not fit.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given |= layer
    if {"data", "task"} <= given.keys():
        raise ConfigError("give --task or --data, not both: data of your own are a task of their own")
    method = SETTINGS["method"].convert(given.get("method", Method.MEERKAT))
    return _from_flat(preset(method, given) | given)


def convert(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by flat names as ``RunConfig`` has them.

    Raises:
        ConfigError: for a name that is no setting, or a value that does not fit.
    """
    for name in given:
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(sorted(SETTINGS))}")
    return {name: SETTINGS[name].convert(value) for name, value in given.items()}


def _from_flat(given: Mapping[str, Any]) -> RunConfig:
    parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *_SECTIONS)}
    for name, value in convert(given).items():
        parts[SETTINGS[name].section][SETTINGS[name].name] = value
    sections = {section: kind(**parts[section]) for section, kind in _SECTIONS.items()}
    return RunConfig(**parts[""], **sections)


__all__ = ["SETTINGS", "RunConfig", "convert", "make_config"]
