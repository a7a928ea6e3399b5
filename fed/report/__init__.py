"""Outputs made from run directories: the HTML report, model cards, checkpoints."""
