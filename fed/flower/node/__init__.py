"""The node's side: a ClientApp without torch, and the worker that keeps the model between messages."""
