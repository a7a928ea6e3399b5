"""The program for a machine with a GPU: bits first, then kernels, then steps, each with its own time limit and JSON."""
