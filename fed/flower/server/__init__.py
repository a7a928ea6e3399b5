"""The server's side: a run whose exchange is Flower's Grid, and Flower's own strategies."""
