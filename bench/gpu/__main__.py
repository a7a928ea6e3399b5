"""``python -m meerkat_engine.bench.gpu``."""

from .program import main

if __name__ == "__main__":
    main(prog_name="python -m meerkat_engine.bench.gpu")
