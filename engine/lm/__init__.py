"""Language models: loading, prompts, losses, evaluation, checkpoints."""
