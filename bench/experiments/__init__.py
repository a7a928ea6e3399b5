"""The paper's experiments, each a grid of runs, one table and one figure: ``meerkat-engine experiment NAME``."""
