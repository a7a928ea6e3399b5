"""A whole run on a checkpoint with SmolLM2-135M's shape, its weights random: what a user's run takes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...engine.lm import embedded
from ...engine.lm.checkpoint import save_checkpoint
from .. import shapes
from .part import Record, part
from .runs import captured_and_eager


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measure(device: torch.device, record: Record) -> None:
    """Runs on SmolLM2-135M's shape with random weights and the embedded tokenizer, captured and not, and replays."""
    on_gpu = device.type == "cuda"
    directory, task = record.directory(), embedded.TASKS[embedded.NAME]
    lm = embedded.load()
    if on_gpu:
        lm = dataclasses.replace(lm, model=shapes.build("smollm2-135m", torch.bfloat16, torch.device("cpu")))
    save_checkpoint(lm, directory / "checkpoint", "For timing.")
    examples = [{name: row[name] for name in ("review", "label")} for row in embedded.rows("train")]
    texts = [{"text": text} for text in embedded.calibration_texts(16)[0]]
    settings = {
        "model": str(directory / "checkpoint"),
        "data": _write_lines(directory / "train.jsonl", examples if on_gpu else examples[:80]),
        "template": task.template,
        "labels": ",".join(word.strip() for word in task.label_words),
        "calibration": _write_lines(directory / "texts.jsonl", texts),
        "calibration_texts": 16,
        "density": 1e-3 if on_gpu else 1e-2,
        "eval_examples": 16,
        "rounds": 5 if on_gpu else 1,
        "local_steps": 20 if on_gpu else 2,
    }
    captured_and_eager(device, record, directory, settings)


if __name__ == "__main__":
    part(measure)()
