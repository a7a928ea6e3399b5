"""What leaves a run: the HTML report, model cards, checkpoints."""
