"""The settings of a run: sections, their checks, TOML files, command-line options."""
