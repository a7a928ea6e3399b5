"""The server's side of a federation over Flower: runs whose exchange is Flower's Grid, and Flower's own strategies."""
