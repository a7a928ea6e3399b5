"""The sections of a run's settings. Each section checks its own values; ``RunConfig`` checks combinations of sections.

The text of a setting is its line in ``meerkat-engine run --help``.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ...engine.backend import BACKENDS
from ...engine.captured import Capture
from ...engine.errors import ConfigError
from ...engine.lm import embedded
from ...engine.lm.free_text.rendering import PromptFormat
from ...engine.lm.layout import Layout
from ...engine.lm.models import DTYPES
from ...engine.lm.objective import Objective
from ...engine.lm.quantize import Offload, Quantize
from ...engine.two_points import PointsMode
from ..aggregation import Aggregation, Rule, StoppedWeight, Weighting
from ..attack import Attack
from ..partition import Partition
from ..privacy import Privacy
from ..selection import NullPaths, Thresholds, Windows
from ..terms import Schedule
from .settings import Checked, setting

# Value of the settings dtype and device that a run replaces by what it stands for; see ``setup.model.resolved``.
AUTO = "auto"


class MaskedWeightsMode(StrEnum):
    """How masked weights beside read-only ones get into a linear layer; see ``FrozenWeight``."""

    WRITE = "write"
    ADD = "add"
    ROUND = "round"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """``[model]``: the base model, its dtype, and the device and code that compute it."""

    source: str = setting(
        embedded.NAME,
        "base model: Hugging Face id, directory or GGUF file",
        option="model",
        shown="the embedded model",
    )
    dtype: str = setting(
        AUTO,
        "dtype of the weights: float32, bfloat16, float16, or auto: float32 on a CPU, the checkpoint's own on a GPU",
        choices=(AUTO, *DTYPES),
        metavar="DTYPE",
    )
    device: str = setting(AUTO, "device of the model: cpu, cuda, or auto: cuda where there is one")
    backend: str = setting(
        "auto", "code that runs the masked operations: auto, torch, numba or triton", choices=BACKENDS
    )
    capture: Capture = setting(
        Capture.AUTO, "on a GPU, local steps as CUDA graphs: auto: where possible, off. The bits are the same"
    )
    quantize: Quantize = setting(
        Quantize.NONE,
        "how the weights that no step changes are kept: none (in the dtype, masked weights in place), as-stored (in "
        "the checkpoint's own format), nf4, int8, torchao-int8. All but none: read-only, masked weights beside them",
    )
    offload: Offload = setting(
        Offload.NONE,
        "with --quantize on a GPU, where the read-only weights are: none (on the GPU), cpu (in the host's memory), "
        "disk (in the checkpoint's files)",
    )
    masked_weights: MaskedWeightsMode = setting(
        MaskedWeightsMode.WRITE,
        "with --quantize, how masked weights get into a linear layer: write (into its dense weight, in the dtype), add "
        "(to its output, in float32), round (written, rounded to int8: for comparison)",
    )

    @property
    def kept(self) -> str:
        """How the weights are kept, as in a delta; see ``Delta``."""
        if self.masked_weights is MaskedWeightsMode.WRITE:
            return str(self.quantize)
        return f"{self.quantize}+{self.masked_weights}"

    def __post_init__(self) -> None:
        self._require(self.backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}")
        self._require(self.dtype in (AUTO, *DTYPES), "dtype", f"one of {', '.join((AUTO, *DTYPES))}")
        for name, value in (("offload", self.offload), ("masked_weights", self.masked_weights)):
            has_effect = value not in (Offload.NONE, MaskedWeightsMode.WRITE)
            if has_effect and self.quantize is Quantize.NONE:
                raise ConfigError(
                    f"{name} {value} is for read-only weights; give --quantize too (as-stored keeps the checkpoint's)"
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """``[data]``: a built-in task, or your own data."""

    task: str = setting(embedded.NAME, "task to fine-tune for", shown="the embedded task")
    directory: Path | None = setting(
        None, "directory with TASK/{train,validation}.jsonl", option="data_dir", shown="download from the hub"
    )
    file: Path | None = setting(
        None,
        "file with your own examples, instead of --task: JSON Lines, JSON, CSV, TSV or Parquet; with --labels a choice "
        "between label words, else free text",
        option="data",
    )
    validation: Path | None = setting(
        None, "file with the validation examples for --data", shown="a fifth of --data, held out"
    )
    dataset: str | None = setting(None, "data set on the Hugging Face hub, instead of --data")
    config: str | None = setting(None, "configuration (subset) of --dataset", option="dataset_config")
    revision: str | None = setting(None, "branch, tag or commit of --dataset", option="dataset_revision")
    split: str = setting("train", "split of --dataset with the training examples", option="dataset_split")
    validation_split: str | None = setting(
        None,
        "split of --dataset with the validation examples",
        option="dataset_validation_split",
        shown="a fifth, held out",
    )
    template: str | None = setting(None, "prompt for your own data, with field names in braces: '{text} It was'")
    labels: str | None = setting(
        None,
        "label words for your own data, one per class, separated by commas: terrible,great; each after a space, unless "
        "the template ends with a line break or the words are in double quotes",
    )
    label_field: str | None = setting(
        None,
        "field of your own data that holds the class (a number from 0) or the label word; for free text, the class by "
        "which examples are partitioned",
        shown="label; none for free text",
    )
    answer: str | None = setting(
        None, "answer that follows --template in free text, with field names in braces: '{summary}'"
    )
    prompt_format: PromptFormat = setting(
        PromptFormat.AUTO,
        "free text: prompts as messages of a chat or as text: chat, text, auto (instructions in a chat, if there is a "
        "chat template)",
    )
    chat_template: Path | None = setting(None, "file with a chat template (Jinja)", shown="the tokenizer's own")
    cut: str | None = setting(
        None,
        "field of your own data that is shortened if a prompt is too long; not for free text",
        shown="the template's first field",
    )
    max_length: int = setting(256, "maximum number of tokens of prompt and answer")

    def __post_init__(self) -> None:
        self._require(self.max_length >= 1, "max_length", "at least 1")

    @property
    def is_own(self) -> bool:
        """Whether the examples are the user's own, from a file or a data set on the hub."""
        return self.file is not None or self.dataset is not None


@dataclass(frozen=True, kw_only=True)
class ClientsConfig(Checked):
    """``[clients]``: number of clients, number of participants in a round, and partition of the examples."""

    count: int = setting(4, "number of clients K", option="clients")
    per_round: int = setting(0, "number of clients sampled for each round; 0: all", option="clients_per_round")
    partition: Partition = setting(Partition.IID, "how examples are partitioned among clients: " + ", ".join(Partition))
    alpha: float = setting(0.5, "concentration of the dirichlet partition; smaller: clients differ more")
    field: str | None = setting(
        None, "natural partition: field of an example that names its client", option="client_field",
        shown="the task's",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self._require(self.count >= 1, "count", "at least 1")
        self._require(0 <= self.per_round <= self.count, "per_round", f"0 (all) to the {self.count} clients")
        self._require(0 < self.alpha < math.inf, "alpha", "finite and positive")

    @property
    def participants(self) -> int:
        """Number of clients that take part in a round."""
        return self.per_round or self.count


@dataclass(frozen=True, kw_only=True)
class StepConfig(Checked):
    """``[step]``: batch, loss, perturbations and learning rate of a local step."""

    batch_size: int = setting(16, "number of examples of a step; with --dp-noise: its expected value")
    micro_batch_size: int = setting(0, "number of examples of one forward pass; 0: the full batch")
    layout: Layout = setting(
        Layout.AUTO,
        "how a forward pass reads sequences of different lengths: packed (several in a row), sorted (parts of like "
        "length), padded (to the longest), auto (packed where the model computes the same, else sorted)",
    )
    objective: Objective | None = setting(
        None,
        "loss: candidates (cross-entropy over the label words), language-model (mean over answer tokens), "
        "language-model-by-example (mean over examples)",
        shown="candidates; language-model for free text",
    )
    lr: float = setting(1e-4, "learning rate (eta) of the first step")
    schedule: Schedule = setting(Schedule.CONSTANT, "learning rate over the run: " + ", ".join(Schedule))
    points: PointsMode = setting(
        PointsMode.AUTO,
        "with --quantize, the losses at +eps and -eps: separate (two forward passes), together (one, over the batch "
        "twice), auto (together for few tokens, and with --offload)",
    )
    queries: int = setting(1, "number of perturbations q of a step [decomfl: 5, meerkat-fzoo: 8]")
    eps: float = setting(1e-3, "scale of the perturbation")

    def __post_init__(self) -> None:
        for name in ("batch_size", "queries"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.micro_batch_size >= 0, "micro_batch_size", "0 or more")
        self._require(0 < self.eps < math.inf, "eps", "finite and positive")
        self._require(0 <= self.lr < math.inf, "lr", "finite and not negative")


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Checked):
    """``[mask]``: the elements that are trained, and the calibration text that ranks them."""

    density: float = setting(1e-3, "density u: share of the elements that are trained, in (0, 1]")
    file: Path | None = setting(None, "mask file to use instead of choosing a mask", option="mask")
    calibration: Path | None = setting(
        None,
        "file with calibration text: rows with the field text (JSON Lines, Parquet, ...), or plain text or code",
        shown="DATA_DIR/c4_sample/train.jsonl, else C4 from the hub",
    )
    texts: int = setting(64, "number of calibration texts", option="calibration_texts")
    batch_size: int = setting(4, "number of calibration texts of one gradient", option="calibration_batch_size")
    length: int = setting(256, "maximum number of tokens of a calibration text", option="calibration_length")
    elements: int = setting(
        0,
        "number of elements whose gradients are accumulated at a time, in 8 bytes each, with a pass over the texts for "
        "each such group (0: all in one pass). The mask is the same",
        option="calibration_elements",
    )
    layer: str = setting(
        "", "layer-zo: dotted name of the module to train", shown="the transformer block with the largest gradient"
    )

    def __post_init__(self) -> None:
        self._require(0 < self.density <= 1, "density", "in (0, 1]")
        for name in ("texts", "batch_size", "length"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.elements >= 0, "elements", "0 or more")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Checked):
    """``[lora]``: the adapters of ``lora-fedzo``."""

    rank: int = setting(8, "lora-fedzo: rank of the adapters", option="lora_rank")
    alpha: int = setting(16, "lora-fedzo: alpha of the adapters, their scale times their rank", option="lora_alpha")
    targets: str = setting(
        "",
        "lora-fedzo: names of the modules that get adapters, separated by commas",
        option="lora_targets",
        shown="the usual ones of the architecture",
    )

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            self._require(getattr(self, name) >= 1, name, "at least 1")

    @property
    def modules(self) -> list[str]:
        """The module names in ``targets``."""
        return [name.strip() for name in self.targets.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(Checked):
    """``[selection]``: virtual-path client selection, which finds the clients to stop early."""

    steps: int = setting(
        100, "meerkat-vp and random-stop: number of steps T_cali of a client's virtual path", option="vp_steps"
    )
    initial: int = setting(
        20, "early stopping: number of first steps of the path, compared with the last ones", option="vp_initial"
    )
    later: int = setting(50, "early stopping: number of last steps of the path", option="vp_later")
    rho_later: float | None = setting(
        None,
        "early stopping: threshold of rho_later",
        option="vp_rho_later",
        shown="from the paths of --vp-null",
    )
    rho_quie: float | None = setting(
        None, "early stopping: threshold of rho_quie", option="vp_rho_quie", shown="from these paths"
    )
    sigma: float | None = setting(
        None, "early stopping: |GradIP| below which a step is quiet", option="vp_sigma", shown="from these paths"
    )
    null: NullPaths = setting(
        NullPaths.HELD_OUT,
        "early stopping: paths that the thresholds are derived from: held-out (which the server runs on its own "
        "examples), clients (the clients' own: the server needs no examples)",
        option="vp_null",
    )
    null_paths: int = setting(4, "early stopping: number of paths with --vp-null held-out", option="vp_null_paths")

    def __post_init__(self) -> None:
        for name in ("initial", "later"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.null_paths >= 3, "null_paths", "at least 3")
        given = [name for name in _THRESHOLDS if getattr(self, name) is not None]
        for name in given:
            highest = 1 if name == "rho_quie" else math.inf
            value = getattr(self, name)
            rule = "in [0, 1]" if highest == 1 else "finite and not negative"
            self._require(0 <= value <= highest and math.isfinite(value), name, rule)
        if given and len(given) < len(_THRESHOLDS):
            together, only = (", ".join(map(self.option, names)) for names in (_THRESHOLDS, given))
            raise ConfigError(f"{together} go together; only {only} given")

    def thresholds(self) -> Thresholds | None:
        """The thresholds; None if they are not given."""
        if self.rho_later is None or self.rho_quie is None or self.sigma is None:
            return None
        return Thresholds(rho_later=self.rho_later, rho_quie=self.rho_quie, sigma=self.sigma)

    def windows(self, queries: int) -> Windows:
        """The windows of a path, counted in scalars: ``queries`` scalars a step."""
        return Windows(initial=self.initial * queries, later=self.later * queries)


_THRESHOLDS = ("rho_later", "rho_quie", "sigma")


@dataclass(frozen=True, kw_only=True)
class AggregationConfig(Checked):
    """``[aggregation]``: the rule that combines the clients' scalars, and limits above which they are rejected."""

    rule: Rule = setting(
        Rule.MEAN, "rule that combines the clients' scalars of a step: " + ", ".join(Rule), option="aggregation"
    )
    weighting: Weighting = setting(Weighting.EXAMPLES, "weight p_i of a client in the mean: examples, uniform")
    trim: float = setting(0.2, "trimmed-mean: share of the clients cut from each end, in (0, 0.5)")
    stopped_weight: StoppedWeight = setting(
        StoppedWeight.KEEP,
        "weight p_i of a client that is stopped early, in steps it does not take: keep (it contributes 0, as in the "
        "mean of weights), share (among the clients that take them)",
    )
    clip: float = setting(0.0, "clip scalars to this size before aggregation; 0: no clipping")
    max_scalar: float = setting(1e8, "reject answers with a scalar above this size")
    max_examples: int = setting(0, "reject answers that claim more examples than this; 0: no limit")

    def __post_init__(self) -> None:
        self.build()
        self._require(0 < self.max_scalar < math.inf, "max_scalar", "finite and positive")
        self._require(self.max_examples >= 0, "max_examples", "0 or more")

    def build(self) -> Aggregation:
        """The aggregation rule with its parameters; raises ``ConfigError`` if one is out of range."""
        return Aggregation(
            rule=self.rule,
            weighting=self.weighting,
            trim=self.trim,
            clip=self.clip,
            stopped_weight=self.stopped_weight,
        )


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Checked):
    """``[privacy]``: differentially private scalars; off if ``noise`` is 0."""

    noise: float = setting(
        0.0, "differential privacy: noise multiplier sigma of the scalars; 0: off", option="dp_noise"
    )
    clip: float = setting(
        0.02, "differential privacy: bound C on the change of a loss difference by one example", option="dp_clip"
    )
    delta: float = setting(1e-5, "differential privacy: delta, in (0, 1)", option="dp_delta")

    def __post_init__(self) -> None:
        self._require(0 <= self.noise < math.inf, "noise", "finite and not negative (0: no privacy)")
        if not self.noise:
            for name in ("clip", "delta"):
                if getattr(self, name) != getattr(PrivacyConfig, name):
                    raise ConfigError(
                        f"{self.option(name)} protects nobody without noise; give dp_noise too, or leave it out"
                    )

    def build(self, batch_size: int) -> Privacy | None:
        """The privacy parameters for batches of an expected size; None if there is no noise.

        Raises:
            ConfigError: if a number is out of range.
        """
        if not self.noise:
            return None
        return Privacy(clip=self.clip, noise_multiplier=self.noise, delta=self.delta, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Checked):
    """``[attack]``: simulated hostile clients, to measure aggregation rules with."""

    kind: Attack = setting(
        Attack.NONE, "simulate hostile clients that alter their scalars: none, sign-flip (times -1), scale (times 1e6)",
        option="attack",
    )  # fmt: skip
    clients: int = setting(0, "number of hostile clients; the last ones are hostile", option="attackers")

    def __post_init__(self) -> None:
        if (self.clients > 0) != (self.kind is not Attack.NONE):
            raise ConfigError(f"attack and attackers go together, got {self.kind} and {self.clients}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked):
    """``[evaluation]``: rounds between evaluations, and number of held-out examples."""

    every: int = setting(
        0, "number of rounds between evaluations; 0: only before and after training", option="eval_every"
    )
    examples: int = setting(
        0, "number of validation examples, drawn by the seed, from each class its share; 0: all", option="eval_examples"
    )
    metrics: str = setting(
        "",
        "free text: answers are generated and compared, by metrics separated by commas: exact-match, token-f1, rouge-l",
    )
    max_new_tokens: int = setting(64, "maximum number of tokens of a generated answer")

    def __post_init__(self) -> None:
        for name in ("every", "examples"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")


__all__ = [
    "AUTO",
    "AggregationConfig",
    "AttackConfig",
    "ClientsConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MaskConfig",
    "ModelConfig",
    "PrivacyConfig",
    "SelectionConfig",
    "StepConfig",
]
