"""``evaluate``: loss and scores of a model on a task's examples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError
from .example_set import Examples
from .examples import EncodedTask
from .free_text.encoded import EncodedText
from .objective import candidate_scores
from .scores import LOSS, shown
from .text_evaluation import examples_per_batch, generated_scores, held_out_loss
from .text_metrics import Metric, named_metrics


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of a model on a set of examples.

    Args:
        loss: mean cross-entropy over the candidates, for free text over all answer tokens; NaN or infinite if a score
            is.
        examples: number of examples.
        nonfinite: number of examples with a score that is NaN or infinite.
        scores: for classification ``accuracy``, the share of examples whose most likely candidate is the right one, in
            [0, 1], where an example without finite scores counts as wrong, and ``macro_f1``, the mean of the classes'
            F1, in [0, 1]; for free text ``perplexity``, which is exp(loss), and the metrics of generated answers that
            were asked for.
        recalls: for classification, the share of each class's examples that are predicted right, [C], in [0, 1]; NaN
            for a class without examples. Empty for free text.
    """

    loss: float
    examples: int
    nonfinite: int = 0
    scores: Mapping[str, float]
    recalls: Sequence[float] = ()

    @property
    def main(self) -> tuple[str, float]:
        """Name and value of the score that the task is judged by; see ``scores.shown``."""
        name = shown(list(self.scores))[0]
        return name, self.loss if name == LOSS else self.scores[name]


def evaluate(
    model: nn.Module,
    data: Examples,
    batch_size: int | None = None,
    *,
    metrics: Sequence[str | Metric] = (),
    max_new_tokens: int = 64,
) -> Evaluation:
    """Evaluates a model on all examples, in batches of similar length.

    Loss, accuracy and macro-F1 make the host wait for the device once, at the end.

    Args:
        model: a transformers causal LM.
        data: the examples, at least one.
        batch_size: number of examples per batch; None: 32 on a CPU, 256 on a GPU.
        metrics: metrics of generated answers, for free text; see ``text_metrics.score_texts``.
        max_new_tokens: maximum number of tokens of a generated answer.

    Raises:
        ConfigError: if metrics are given for a classification task, or cannot be computed.
        TypeError: if the examples are of another kind.
    """
    named_metrics(metrics)  # raises before slow work
    if isinstance(data, EncodedText):
        loss, nonfinite = held_out_loss(model, data, batch_size)
        scores = {"perplexity": _exp(loss)}
        if metrics:
            scores |= generated_scores(model, data, metrics, max_new_tokens)
        return Evaluation(loss=loss, examples=len(data), nonfinite=nonfinite, scores=scores)
    if not isinstance(data, EncodedTask):
        raise TypeError(f"cannot evaluate {type(data).__name__}")
    if metrics:
        raise ConfigError(f"metrics are for free text, and {data.name} is a choice between label words; leave them out")
    return _evaluate_classification(model, data, batch_size)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.inference_mode()
def _evaluate_classification(model: nn.Module, data: EncodedTask, batch_size: int | None) -> Evaluation:
    """See ``evaluate``."""
    device = next(model.parameters()).device
    size = batch_size or examples_per_batch(device)
    order = torch.tensor(sorted(range(len(data)), key=lambda i: len(data.prompts[i])), dtype=torch.int64, device="cpu")
    batches = (data.batch(part.tolist(), answers="all", device=device) for part in order.split(size))
    scores, labels = torch.cat([candidate_scores(model, batch) for batch in batches]).cpu(), data.labels[order]
    confusion = confusion_matrix(labels, predictions(scores), len(data.candidates))
    return Evaluation(
        loss=float(functional.cross_entropy(scores.double(), labels)),
        examples=len(data),
        nonfinite=int(confusion[:, -1].sum()),
        scores={"accuracy": int(confusion.trace()) / len(data), "macro_f1": macro_f1(confusion)},
        recalls=(confusion.diagonal().double() / confusion.sum(1)).tolist(),
    )


def predictions(scores: Tensor) -> Tensor:
    """The class with the highest score of each example.

    Args:
        scores: [n, C].

    Returns:
        int64 [n] in [0, C); C, which is no class, for an example with a score that is NaN or infinite.
    """
    return torch.where(scores.isfinite().all(-1), scores.argmax(-1), scores.shape[-1])


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts how often each true class (row) was predicted as each class (column).

    Args:
        labels: int64 [n], true classes.
        predicted: int64 [n], predicted classes; see ``predictions``.
        classes: number of classes, C.

    Returns:
        int64 [C, C + 1]. The last column counts the examples without a prediction.
    """
    columns = classes + 1
    return torch.bincount(labels * columns + predicted, minlength=classes * columns).view(classes, columns)


def macro_f1(confusion: Tensor) -> float:
    """Mean over the classes of F1, the harmonic mean of precision and recall, in [0, 1].

    A class that is neither present nor predicted has no F1 and is left out.

    Args:
        confusion: int64 [C, C + 1]; see ``confusion_matrix``. An example without a prediction counts as present.
    """
    hits, present_or_predicted = confusion.diagonal().double(), confusion.sum(0)[:-1] + confusion.sum(1)
    counted = present_or_predicted > 0
    return float((2 * hits[counted] / present_or_predicted[counted]).mean())


__all__ = ["Evaluation", "confusion_matrix", "evaluate", "macro_f1", "predictions"]
