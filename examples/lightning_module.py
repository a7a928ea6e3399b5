"""Fine-tunes with PyTorch Lightning by manual optimization: logging, schedule, validation, checkpoints to resume from.

python examples/lightning_module.py [--epochs N] [--output DIR] [--resume CHECKPOINT]
"""

import argparse
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler

from meerkat_engine import SparseMask, SparseZO, replay
from meerkat_engine.engine import stream
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.data import token_batches
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective, candidate_scores, task_loss
from meerkat_engine.engine.parameters import fingerprint

SEED = 7


class FineTuning(lightning.LightningModule):
    """Fine-tunes the embedded model on its task.

    Attributes:
        updates: (seed, lr, g) of all steps, in the format of ``replay``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.updates = False, []
        lm, task = embedded.load(), embedded.TASKS["embedded"]
        self.model, (texts, _) = lm.model, embedded.calibration_texts(256)
        self.mask = SparseMask.from_gradients(self.model, token_batches(texts, lm.tokenizer, 16, 128), density=0.01)
        self.data = {s: EncodedTask(task, embedded.rows(s), lm.tokenizer, 128, s) for s in ("train", "validation")}

    def configure_optimizers(self):
        optimizer = SparseZO(self.model, self.mask, lr=1e-2, seed=SEED)  # Lightning has put the model on its device
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=self.trainer.estimated_stepping_batches)]

    def training_step(self, indices: Tensor, _: int) -> Tensor:
        self.model.eval()  # no dropout: it would differ between the two forward passes
        batch = self.data["train"].batch(indices.tolist(), answers="all", device=self.device)
        wrapped, (lr,) = self.optimizers(), self.lr_schedulers().get_last_lr()
        optimizer = wrapped.optimizer
        seed = stream.step_seed(SEED, 0, optimizer.steps)
        loss = wrapped.step(lambda: task_loss(self.model, batch, Objective.CANDIDATES))
        self.lr_schedulers().step()
        self.updates.append((seed, lr, optimizer.projected_gradients.pop()))
        self.log_dict({"loss": loss, "lr": lr, "projected_gradient": self.updates[-1][2]}, batch_size=len(indices))
        return loss

    def validation_step(self, indices: Tensor, _: int) -> None:
        batch = self.data["validation"].batch(indices.tolist(), answers="all", device=self.device)
        right = candidate_scores(self.model, batch).argmax(-1) == batch.labels
        self.log("accuracy", right.float().mean(), batch_size=len(indices), prog_bar=True)

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["updates"] = self.updates

    def on_load_checkpoint(self, checkpoint) -> None:
        self.updates = checkpoint["updates"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path)
    arguments, module = parser.parse_args(), FineTuning()
    train, held_out = (range(len(module.data[split])) for split in ("train", "validation"))
    order = DistributedSampler(
        train, num_replicas=1, rank=0, seed=SEED
    )  # seeded by epoch, so a resumed run has the same order
    saver = ModelCheckpoint(arguments.output, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(max_epochs=arguments.epochs, accelerator="cpu", logger=False, callbacks=[saver])
    loaders = DataLoader(train, batch_size=16, sampler=order), DataLoader(held_out, batch_size=50)
    trainer.fit(module, *loaders, ckpt_path=arguments.resume)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    base = embedded.load().model
    replay(base, module.mask, module.updates)
    print(f"trained   {fingerprint(module.model)}\nreplayed  {fingerprint(base)}")
