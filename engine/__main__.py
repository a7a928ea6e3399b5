"""``python -m meerkat_engine``: the command line."""

from .fed.cli import main

main()
