"""Builds from the settings what a run works with: model, examples, mask, server and clients."""
