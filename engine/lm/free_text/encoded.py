"""``EncodedText``: tokenized examples of a free-text task, and batches of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ..batches import Item
from ..example_set import Examples
from ..layout import Layout
from ..scored_batches import ScoredBatch, ScoredText, scored_batch
from .rendering import Rendered, Renderer
from .shapes import Content, EmptyAnswerError, Plain
from .task import Row, TextTask

_SHOWN = 3  # rows that a note names
_SHOWN_TOKENS = 60  # tokens of the example in a note, at each end


class EncodedText(Examples):
    """Tokenized examples of a free-text task.

    Rows without an answer, or with an answer that does not fit, are left out. Where prompt and answers have too many
    tokens, the prompt loses its first ones, and with them the answers among them; the last answer is never cut.

    Args:
        task: the task.
        rows: the rows of the data set.
        places: where each row stands, for messages.
        renderer: makes tokens of prompts and answers.
        max_length: maximum number of tokens of prompt and answers together.
        name: name of the data, for messages.
        positions: maximum number of tokens that the model can read, if it has one.

    Attributes:
        task: the task. For the attributes of all kinds of examples see ``Examples``.
        texts: the tokens of each example, and those to predict.

    Raises:
        DataError: if a row has another shape than the first one, a value of another type, or no field that a template
            names; if a prompt has no tokens; or if no example is left.
        ConfigError: if the rows are conversations, and there is no chat template.
    """

    def __init__(
        self,
        task: TextTask,
        rows: Sequence[Row],
        places: Sequence[str],
        renderer: Renderer,
        max_length: int,
        name: str,
        positions: int | None = None,
    ) -> None:
        self.task, self.name, self._renderer, self._positions = task, task.name, renderer, positions
        limit = max_length if positions is None else min(max_length, positions)
        self._left_out: dict[str, list[str]] = {}
        shape = None
        contents: dict[int, Content] = {}
        prepared: dict[int, Row] = {}
        for i, (row, where) in enumerate(zip(rows, places, strict=True)):
            prepared[i] = task.row(row, where)
            shape = task.shape(prepared[i], where) if shape is None else shape
            try:
                contents[i] = task.content(prepared[i], shape, where)
            except EmptyAnswerError:
                self._leave_out("no answer", where)
        self._shape = "prompt and answer by template" if shape is None else str(shape)
        self._merged, self.truncated = 0, 0
        self.texts: list[ScoredText] = []
        self._prompts: list[int] = []  # where each last answer begins
        self.kept: list[int] = []
        of_kept = [places[i] for i in contents]
        for i, rendered in zip(contents, renderer.render(list(contents.values()), of_kept), strict=True):
            self._add(i, rendered, limit, places[i])
        self._references = [
            task.acceptable(prepared[i], places[i]) or [self._own_answer(contents[i], text)]
            for i, text in zip(self.kept, self.texts, strict=True)
        ]
        if not self.kept:
            raise DataError(f"{name} has no example that can be used{self._why_left_out()}")
        self.lengths = [text.length for text in self.texts]
        self._classes([prepared[i] for i in self.kept], [places[i] for i in self.kept])
        self.pad = int(renderer.tokenizer.pad_token_id)
        self.layout, self.layout_reason = Layout.SORTED, ""

    def _own_answer(self, content: Content, text: ScoredText) -> str:
        """The text of the last answer, as a perfect model would generate it; without surrounding white space."""
        presented = self._renderer.presented(content)
        if isinstance(presented, Plain):
            return presented.answer.strip()
        begin, end = _spans(text)[-1]
        return str(self.tokenizer.decode(text.ids[begin:end], skip_special_tokens=True)).strip()

    def _leave_out(self, reason: str, where: str) -> None:
        self._left_out.setdefault(reason, []).append(where)

    def _add(self, row: int, rendered: Rendered, limit: int, where: str) -> None:
        """Adds an example, its prompt cut to fit."""
        if not rendered.spans:
            self._leave_out("no answer", where)
            return
        begin, end = rendered.spans[-1]
        if end - begin + 1 > limit:  # at least one token of the prompt stays
            self._leave_out(f"an answer too long for {limit} tokens (--max-length)", where)
            return
        cut, spans = 0, rendered.spans
        ids = rendered.ids[:end]
        if len(ids) > limit:
            cut = len(ids) - limit
            # the token that begins every text stays
            first = ids[:1] if ids[0] == self._renderer.tokenizer.bos_token_id else []
            ids = [*first, *ids[cut + len(first) :]]
            earlier = [(b - cut, e - cut) for b, e in spans[:-1] if b - cut > len(first)]
            spans = [*earlier, (begin - cut, end - cut)]
            self.truncated += 1
        scored = np.concatenate([np.arange(b, e, dtype=np.int64) for b, e in spans])
        self.texts.append(ScoredText(ids=np.array(ids, dtype=np.int64), scored=scored))
        self._prompts.append(begin - cut)
        self.kept.append(row)
        self._merged += rendered.merged

    def _classes(self, rows: Sequence[Row], places: Sequence[str]) -> None:
        """Sets labels and names of the classes."""
        field = self.task.class_field
        if field is None:
            self.labels, self.class_names = torch.zeros(len(rows), dtype=torch.int64, device="cpu"), []
            return
        for row, where in zip(rows, places, strict=True):
            if not isinstance(row.get(field), str | int):
                raise DataError(
                    f"{where}: the field {field!r}, by which clients get their share, must be text or an integer; got "
                    f"{row.get(field)!r:.80}"
                )
        names = sorted({str(row[field]) for row in rows})
        numbers = {class_name: i for i, class_name in enumerate(names)}
        self.class_names = names
        self.labels = torch.tensor([numbers[str(row[field])] for row in rows], dtype=torch.int64, device="cpu")

    @property
    def digest(self) -> str:
        """See ``Examples``."""
        content = [[text.ids.tolist(), text.scored.tolist()] for text in self.texts]
        return hashlib.sha256(json.dumps([content, self.labels.tolist()]).encode()).hexdigest()

    @property
    def answer_tokens(self) -> int:
        """Number of tokens to predict in all examples."""
        return sum(len(text.scored) for text in self.texts)

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return self._renderer.end_tokens

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the examples were made with."""
        return self._renderer.tokenizer

    def prompt_ids(self, i: int) -> list[int]:
        """Token ids of an example up to its last answer."""
        return [int(token) for token in self.texts[i].ids[: self._prompts[i]]]

    def references(self, i: int) -> list[str]:
        """The acceptable texts of an example's last answer, at least one."""
        return self._references[i]

    def batch(self, indices: Sequence[int], *, answers: str, device: torch.device) -> ScoredBatch:
        """See ``Examples``. There are no candidates to score.

        Raises:
            ValueError: if ``answers`` is "all".
        """
        if answers != "gold":
            raise ValueError("free text has no candidates; the loss is on its answers (language-model)")
        return scored_batch(self.layout, [self.texts[i] for i in indices], self.pad, device, self._positions)

    def layout_items(self) -> list[Item]:
        """See ``Examples``."""
        return [text.item() for text in self.texts]

    @property
    def overview(self) -> list[str]:  # type: ignore[override]
        """See ``Examples``: the shape of the rows, and one example."""
        answers = sum(len(_spans(text)) for text in self.texts)
        lines = [
            f"{self.name}: {self._shape}; {answers} answers of {self.answer_tokens / answers:.0f} tokens on average; "
            f"the first example, what is learned in [[ ]]:",
            self._shown(self.texts[0]),
        ]
        if not self.end_tokens:
            lines.append("the tokenizer has no end-of-text token: the model does not learn where an answer ends")
        elif int(self.texts[0].ids[-1]) not in self.end_tokens:
            lines.append("the answer ends without an end token: the model does not learn where an answer ends")
        return lines

    @property
    def notes(self) -> list[str]:  # type: ignore[override]
        """See ``Examples``."""
        lines = [
            f"left out, {reason}: {len(places)} rows ({_some(places)})" for reason, places in self._left_out.items()
        ]
        if self.truncated:
            lines.append(f"{self.truncated} prompts were cut at their beginning to fit (--max-length)")
        if self._merged:
            lines.append(f"in {self._merged} examples the first token of an answer begins in the prompt")
        return lines

    def _shown(self, text: ScoredText) -> str:
        """A text in one line, with its answers marked."""
        parts, at = [], 0
        for begin, end in _spans(text):
            parts += [self._decoded(text.ids[at:begin]), "[[", self._decoded(text.ids[begin:end]), "]]"]
            at = end
        return "".join(parts)

    def _decoded(self, ids: Any) -> str:
        def decode(part: Any) -> str:
            return str(self.tokenizer.decode(part, skip_special_tokens=False)).replace("\n", "⏎")

        if len(ids) <= 2 * _SHOWN_TOKENS:
            return decode(ids)
        return f"{decode(ids[:_SHOWN_TOKENS])} ... {decode(ids[-_SHOWN_TOKENS:])}"

    def _why_left_out(self) -> str:
        counts = Counter({reason: len(places) for reason, places in self._left_out.items()})
        return "".join(f"; {reason}: {count} rows" for reason, count in counts.items())


def _spans(text: ScoredText) -> list[tuple[int, int]]:
    """Begin and end of each run of tokens to predict."""
    breaks = np.flatnonzero(np.diff(text.scored) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(text.scored, breaks)]


def _some(places: Sequence[str]) -> str:
    """The first places, shortened."""
    return "; ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")


__all__ = ["EncodedText"]
