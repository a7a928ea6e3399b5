"""The paper's experiments (``meerkat-engine experiment NAME``): each is a grid of runs with tables and a figure."""
