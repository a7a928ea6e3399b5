"""Forward passes over batches of real tasks in each layout: positions computed for a real token, and time.

Each repetition runs all layouts on the same batch in turn, and times are ratios to the padded layout's.
"""

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine import stream
from ..engine.errors import ConfigError
from ..engine.lm import embedded
from ..engine.lm.data import task_rows
from ..engine.lm.examples import EncodedTask
from ..engine.lm.layout import Layout
from ..engine.lm.models import LanguageModel, max_positions
from ..engine.lm.objective import candidate_scores
from ..engine.lm.padding_probe import BATCHED
from ..engine.lm.rows import Rows, SortedRows
from ..engine.lm.tasks import TASKS, Row, Task
from .kernels import SEED, CheckError
from .measure import Spread, Stopwatch
from .tables import table

LAYOUTS = (Layout.PADDED, Layout.SORTED, Layout.PACKED)
# Examples that batches are drawn from, and batches whose positions are counted; fewer of them are timed.
_EXAMPLES, _COUNTED, _MAX_LENGTH = 1000, 50, 256


def task_examples(data_dir: Path | None) -> list[tuple[Task, Sequence[Row]]]:
    """Training examples of all tasks of a directory, at most 1,000 each; None: of the embedded tasks.

    Raises:
        ConfigError: if the directory has none of the built-in tasks.
    """
    if data_dir is None:
        return [(task, embedded.rows("train", name)[:_EXAMPLES]) for name, task in embedded.TASKS.items()]
    names = [name for name, task in TASKS.items() if any((data_dir / place).is_dir() for place in _places(task))]
    if not names:
        raise ConfigError(f"{data_dir} has a directory for none of the tasks {', '.join(TASKS)}")
    return [(TASKS[name], task_rows(TASKS[name], "train", data_dir)[:_EXAMPLES]) for name in names]


def _places(task: Task) -> list[str]:
    return [f"{task.name}_{domain}" for domain in task.domains] if task.domains else [task.name]


def measure_forwards(
    lm: LanguageModel, tasks: list[tuple[Task, Sequence[Row]]], *, batch_size: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Compares the layouts' scores, then times their forward passes.

    Args:
        lm: the model and its tokenizer.
        tasks: tasks and their examples.
        batch_size: examples per batch.
        repeats: number of batches that are timed, at least 2.

    Yields:
        A record per task, ready for JSON: under "positions" the positions computed for each real token, and under
        "ratio" the time over the padded layout's; both by layout, without ``packed`` if the model cannot take it, with
        the reason. A task whose check failed has the reason and no numbers.
    """
    lm.model.requires_grad_(False)
    for task, rows in tasks:
        data = EncodedTask(task, rows, lm.tokenizer, _MAX_LENGTH, task.name, max_positions(lm.model))
        data.resolve_layout(Layout.AUTO, lm.model)
        layouts = [layout for layout in LAYOUTS if layout is not Layout.PACKED or data.layout is Layout.PACKED]
        record = {"task": task.name, "batch_size": batch_size, "reason": data.layout_reason}
        try:
            yield record | _measure(lm, data, layouts, batch_size, repeats)
        except CheckError as error:
            yield record | {"failed": str(error)}


def _measure(
    lm: LanguageModel, data: EncodedTask, layouts: list[Layout], batch_size: int, repeats: int
) -> dict[str, Any]:
    device = next(lm.model.parameters()).device
    batches = [_draw(data, batch_size, number) for number in range(_COUNTED)]
    real = sum(item.length for indices in batches for item in data.items(indices, "all"))
    positions = dict.fromkeys(map(str, layouts), 0)
    for indices in batches:
        for layout in layouts:
            data.layout = layout
            positions[layout] += _positions(data.batch(indices, answers="all", device=device).rows)
    seconds: dict[str, list[float]] = {str(layout): [] for layout in layouts}
    largest, watch = 0.0, Stopwatch(device)
    for number, indices in enumerate(batches[: 1 + repeats]):  # the first is the warm-up
        scores: dict[str, Tensor] = {}
        moments = {}
        for layout in layouts:
            data.layout = layout
            batch = data.batch(indices, answers="all", device=device)
            moments[str(layout)] = watch.warm(functools.partial(_score, lm, batch, scores, layout))
        if number:
            for name, value in moments.items():
                seconds[name].append(watch.seconds(value))
        largest = max(largest, *(float((s - scores[Layout.PADDED]).abs().max()) for s in scores.values()))
    limit = 10 * BATCHED[next(lm.model.parameters()).dtype]
    if not largest <= limit:
        raise CheckError(f"the layouts' scores differ by {largest:.2g}, more than {limit:.2g}")
    return {
        "tokens": real / (_COUNTED * batch_size),
        "largest_difference": largest,
        "positions": {name: count / real for name, count in positions.items()},
        "ratio": {
            name: asdict(Spread.of([a / b for a, b in zip(values, seconds[Layout.PADDED], strict=True)]))
            for name, values in seconds.items()
        },
    }


@torch.inference_mode()
def _score(lm: LanguageModel, batch: Any, scores: dict[str, Tensor], layout: Layout) -> None:
    scores[layout] = candidate_scores(lm.model, batch)


def _draw(data: EncodedTask, batch_size: int, number: int) -> list[int]:
    """Indices of a random batch."""
    order = stream.permutation(stream.derived_seed(SEED, "forw", number), len(data))
    return order[:batch_size].tolist()


def _positions(rows: Rows) -> int:
    parts = rows.parts if isinstance(rows, SortedRows) else (rows,)
    return sum(part.input_ids.numel() for part in parts)


def markdown(case: dict[str, Any]) -> str:
    """Returns the table of the forward passes of one model."""
    lines = []
    for row in case["rows"]:
        if "failed" in row:
            lines.append([row["task"], f"no numbers: {row['failed']}", *[""] * 6])
            continue
        positions = [f"{row['positions'][layout]:.2f}" if layout in row["positions"] else "" for layout in LAYOUTS]
        ratios = [_ratio(row["ratio"][layout]) if layout in row["ratio"] else "" for layout in LAYOUTS[1:]]
        lines.append([row["task"], f"{row['tokens']:.0f}", *positions, *ratios, f"{row['largest_difference']:.1g}"])
    complete = [row for row in case["rows"] if "failed" not in row and Layout.PACKED in row["ratio"]]
    if len(complete) == len(case["rows"]) > 1:
        means = [statistics.mean(row["positions"][layout] for row in complete) for layout in LAYOUTS]
        times = [statistics.mean(row["ratio"][layout]["median"] for row in complete) for layout in LAYOUTS[1:]]
        lines.append(["mean", "", *(f"{m:.2f}" for m in means), *(f"{t:.3g}" for t in times), ""])
    columns = ["task", "tokens an example", "padded: positions a token", "sorted", "packed", "sorted: time over padded",
               "packed", "largest difference of a score"]  # fmt: skip
    title = f"**Forward passes of {case['model']}**, {case['dtype']}, batches of {case['batch_size']}:"
    return f"{title}\n\n{table(columns, lines)}"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['p20']:.3g} to {spread['p80']:.3g})"


__all__ = ["LAYOUTS", "markdown", "measure_forwards", "task_examples"]
