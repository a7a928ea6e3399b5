"""Federation over Flower (extra ``flower``): a ServerApp drives the run, and a worker on each node keeps the model.

Flower starts a process for every message. The modules that such a ClientApp process loads, ``node.app``,
``node.worker_client``, ``records`` and ``strategy_records``, therefore load no torch.
"""
