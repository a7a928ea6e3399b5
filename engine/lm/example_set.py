"""``Examples``: tokenized examples of a task, of classification or of free text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .batches import Batch, Item
from .layout import Layout, resolve_layout
from .scored_batches import ScoredBatch


class Examples(ABC):
    """Tokenized examples of a task, in the order of the rows that they come from.

    Attributes:
        name: the task's name.
        labels: int64 [n], class of each example; all 0 if there are no classes.
        class_names: name of each class; empty if there are no classes.
        kept: for each example, the index of its row; rows that cannot be used are left out.
        lengths: number of tokens of each example.
        truncated: number of prompts that were cut.
        overview: lines that show the user how the rows were understood; empty if the task says it already.
        notes: lines for the user about rows that were left out or changed.
        pad: id of the padding token.
        layout: how batches are laid out: sorted, which any model can take, until ``resolve_layout`` is called.
        layout_reason: why the layout is not packed, where ``resolve_layout`` tried that.
    """

    name: str
    labels: Tensor
    class_names: Sequence[str]
    kept: Sequence[int]
    lengths: Sequence[int]
    truncated: int
    overview: Sequence[str]
    notes: Sequence[str]
    pad: int
    layout: Layout
    layout_reason: str

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of all tokens and labels, in hexadecimal."""

    @abstractmethod
    def batch(self, indices: Sequence[int], *, answers: str, device: torch.device) -> Batch | ScoredBatch:
        """Lays out the given examples.

        Args:
            indices: positions of the examples, in [0, n); at least one.
            answers: "all" to score every candidate of a classification task, "gold" for the likelihood of the answer.
            device: device of the batch's tensors.
        """

    @abstractmethod
    def layout_items(self) -> Sequence[Item]:
        """The examples as ``resolve_layout`` compares their layouts."""

    def resolve_layout(self, layout: Layout, model: nn.Module) -> None:
        """Sets ``layout`` to the one that fits a model, and ``layout_reason``; see ``layout.resolve_layout``."""
        self.layout, self.layout_reason = resolve_layout(layout, model, self.layout_items(), self.pad)


__all__ = ["Examples"]
