"""Fine-tunes in a plain PyTorch loop: mask from pre-training text, schedule, evaluation, and replay of the updates.

    python examples/plain_loop.py [--steps N] [--output DIR]

Writes ``mask.safetensors`` and ``updates.jsonl`` to DIR. Together with the base model, these two files define the
fine-tuned model.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from meerkat_engine import SparseMask, SparseZO, UpdateLog, fingerprint, replay
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.data import token_batches
from meerkat_engine.engine.lm.evaluation import evaluate
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective, task_loss

SEED = 7


def main(steps: int, output: Path) -> None:
    """Trains, saves mask and updates, and replays them on a fresh base model."""
    lm = embedded.load()
    texts, _ = embedded.calibration_texts(256)
    mask = SparseMask.from_gradients(lm.model, token_batches(texts, lm.tokenizer, 16, 128), density=0.01)
    task = embedded.TASKS["embedded"]
    train, held_out = (
        EncodedTask(task, embedded.rows(split), lm.tokenizer, 128, split) for split in ("train", "validation")
    )
    order = torch.Generator().manual_seed(SEED)
    loader = DataLoader(range(len(train)), batch_size=16, shuffle=True, drop_last=True, generator=order)

    optimizer = SparseZO(lm.model, mask, lr=1e-2, seed=SEED)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    while optimizer.steps < steps:
        for indices in loader:
            batch = train.batch(indices.tolist(), answers="all", device=lm.model.device)

            def closure(batch=batch) -> Tensor:  # called twice a step, at +eps and at -eps; returns a float32 loss
                return task_loss(lm.model, batch, Objective.CANDIDATES)

            loss = optimizer.step(closure)
            scheduler.step()
            if optimizer.steps % 50 == 0 or optimizer.steps == steps:
                accuracy = evaluate(lm.model, held_out).scores["accuracy"]
                print(f"step {optimizer.steps}: loss {loss:.4f}, held-out accuracy {accuracy:.4f}")
            if optimizer.steps == steps:
                break

    output.mkdir(parents=True, exist_ok=True)
    mask.save(output / "mask.safetensors")
    optimizer.log.save(output / "updates.jsonl")
    print(f"trained   {fingerprint(lm.model)}")
    base = embedded.load().model
    replay(base, SparseMask.load(output / "mask.safetensors"), UpdateLog.load(output / "updates.jsonl"))
    print(f"replayed  {fingerprint(base)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/plain-loop"))
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
