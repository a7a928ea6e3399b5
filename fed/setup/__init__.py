"""From settings to what a run works with: model, examples, mask, server and clients."""
