"""Federation over Flower (extra ``flower``): the run on the ServerApp's side, a resident worker on each node's.

The modules that a ClientApp loads, ``client_app``, ``records`` and ``link``, load no torch: Flower starts a process for
every message.
"""
