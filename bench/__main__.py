"""``python -m meerkat_engine.bench`` is ``meerkat-engine bench``."""

import sys

from ..fed.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]], prog_name="meerkat-engine")
