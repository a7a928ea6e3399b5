"""The settings of a run: sections and their checks, TOML files, command-line options."""
