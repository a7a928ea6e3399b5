"""``meerkat-engine tune``: finds a learning rate, and eps and density on request, by short runs."""
