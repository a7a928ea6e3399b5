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

from meerkat_engine import SparseMask, SparseZO, UpdateLog, replay
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.data import token_batches
from meerkat_engine.engine.lm.evaluation import predictions
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.objective import Objective, candidate_scores, task_loss
from meerkat_engine.engine.parameters import fingerprint

SEED = 7


class FineTuning(lightning.LightningModule):
    """Fine-tunes the embedded model on its task.

    Attributes:
        resumed_log: log of the training before it was resumed; None if it was not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.resumed_log = False, None
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
        optimizer, (lr,) = self.optimizers(), self.lr_schedulers().get_last_lr()
        loss = optimizer.step(lambda: task_loss(self.model, batch, Objective.CANDIDATES))  # a float32 loss
        self.lr_schedulers().step()
        g = optimizer.optimizer.projected_gradients[-1]
        self.log_dict({"loss": loss, "lr": lr, "projected_gradient": g}, batch_size=len(indices))
        return loss

    def validation_step(self, indices: Tensor, _: int) -> None:
        batch = self.data["validation"].batch(indices.tolist(), answers="all", device=self.device)
        right = predictions(candidate_scores(self.model, batch)) == batch.labels
        self.log("accuracy", right.float().mean(), batch_size=len(indices), prog_bar=True)

    def update_log(self) -> UpdateLog:
        """All updates from the base model on."""
        log = self.optimizers().optimizer.log
        return log if self.resumed_log is None else self.resumed_log + log

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["log"] = vars(self.update_log())

    def on_load_checkpoint(self, checkpoint) -> None:
        self.resumed_log = UpdateLog(**checkpoint["log"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path)
    arguments, module = parser.parse_args(), FineTuning()
    train, held_out = (range(len(module.data[split])) for split in ("train", "validation"))
    # Seeded by epoch, so a resumed run has the same order.
    order = DistributedSampler(train, num_replicas=1, rank=0, seed=SEED)
    saver = ModelCheckpoint(arguments.output, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, accelerator="cpu", devices=1, logger=False, callbacks=[saver]
    )
    loaders = DataLoader(train, batch_size=16, sampler=order), DataLoader(held_out, batch_size=50)
    trainer.fit(module, *loaders, ckpt_path=arguments.resume)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    base = embedded.load().model
    replay(base, module.mask, module.update_log())
    print(f"trained   {fingerprint(module.model)}\nreplayed  {fingerprint(base)}")
