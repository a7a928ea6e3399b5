"""Fine-tunes with transformers' Trainer: evaluation, logging, schedule, checkpoints, and the best model at the end.

    python examples/trainer.py [--steps N] [--output DIR] [--resume]

Every checkpoint contains ``updates.jsonl``, from which ``replay`` reconstructs its weights.
"""

import argparse
from pathlib import Path

from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments

from meerkat_engine import SparseMask, SparseZOTrainer, UpdateLog, fingerprint, replay
from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.data import token_batches
from meerkat_engine.engine.lm.evaluation import predictions


def main(steps: int, output: Path, resume: bool) -> None:
    """Trains, or resumes a training, and replays the updates of the best model on a fresh base model."""
    lm, task = embedded.load(), embedded.TASKS["embedded"]
    texts, _ = embedded.calibration_texts(256)
    mask = SparseMask.from_gradients(lm.model, token_batches(texts, lm.tokenizer, 16, 128), density=0.01)
    train, held_out = (
        [lm.tokenizer(task.prompt(row)) | {"label": task.class_of(row)} for row in embedded.rows(split)]
        for split in ("train", "validation")
    )
    answers = lm.tokenizer(list(task.label_words), add_special_tokens=False, return_tensors="pt")["input_ids"][:, 0]

    def scores(logits: Tensor) -> Tensor:
        """Logits of the label words at the last position, which ends the prompt because of left padding.

        In float32, whatever the model's dtype, so that the difference of a step's losses is not rounded away.
        """
        return logits[:, -1, answers].float()

    def loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        return functional.cross_entropy(scores(outputs.logits), labels)

    trainer = SparseZOTrainer(
        model=lm.model,
        mask=mask,
        args=TrainingArguments(
            str(output),
            learning_rate=1e-2,
            max_steps=steps,
            per_device_train_batch_size=16,
            lr_scheduler_type="cosine",
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=50,
            save_steps=50,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=lm.tokenizer,
        compute_loss_func=loss,
        preprocess_logits_for_metrics=lambda logits, _: predictions(scores(logits)),
        compute_metrics=lambda result: {"accuracy": float((result.predictions == result.label_ids).mean())},
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(output / "best")
    print(f"best      {fingerprint(lm.model)}, after step {trainer.state.best_global_step}")
    base = embedded.load().model
    replay(base, mask, UpdateLog.load(output / "best" / "updates.jsonl"))
    print(f"replayed  {fingerprint(base)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output, arguments.resume)
