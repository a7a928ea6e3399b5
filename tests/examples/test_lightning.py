"""``examples/lightning_module.py`` gives the bits of a plain loop over the same batches, also when resumed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.data import token_batches
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective, task_loss
from meerkat_engine.engine.parameters import fingerprint

from helpers.examples import fingerprints, run_example

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs the extra frameworks"),
]


def plain_loop(epochs: int) -> str:
    """Trains on one thread and returns the fingerprint that the example is expected to end with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lm, (texts, _) = embedded.load(), embedded.calibration_texts(256)
    mask = SparseMask.from_gradients(lm.model, token_batches(texts, lm.tokenizer, 16, 128), density=0.01)
    data = EncodedTask(embedded.TASKS["embedded"], embedded.rows("train"), lm.tokenizer, 128, "train")
    opt = SparseZO(lm.model, mask, lr=1e-2, seed=7)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=50 * epochs)
    numbers = range(len(data))
    order = DistributedSampler(numbers, num_replicas=1, rank=0, seed=7)  # type: ignore[arg-type]
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for indices in DataLoader(numbers, batch_size=16, sampler=order):  # type: ignore[arg-type]
            batch = data.batch(indices.tolist(), answers="all", device=torch.device("cpu"))
            opt.step(lambda batch=batch: task_loss(lm.model, batch, Objective.CANDIDATES))
            scheduler.step()
    torch.set_num_threads(threads)
    return fingerprint(lm.model)


def test_example_gives_the_bits_of_a_plain_loop_also_when_resumed(tmp_path: Path) -> None:
    uninterrupted = run_example("lightning_module.py", "--epochs", 2, "--output", tmp_path / "uninterrupted")
    assert fingerprints(uninterrupted) == [plain_loop(2)] * 2
    assert "'accuracy': " in uninterrupted
    checkpoint = tmp_path / "uninterrupted" / "epoch=0.ckpt"
    resumed = run_example(
        "lightning_module.py", "--epochs", 2, "--output", tmp_path / "resumed", "--resume", checkpoint
    )
    assert resumed.splitlines()[-3:] == uninterrupted.splitlines()[-3:]
    assert not (tmp_path / "resumed" / "epoch=0.ckpt").exists()
