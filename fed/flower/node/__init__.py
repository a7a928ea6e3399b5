"""A node's side of a federation over Flower: a ClientApp without torch, and the worker that keeps the model.

Flower starts a process for every message: ``app`` and ``worker_client``, which it loads, load no torch. The worker
(``worker``, ``handler``, ``local_run``, ``strategy``) stays from one message to the next.
"""
