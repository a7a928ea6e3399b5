"""A Flower App around meerkat-engine."""
