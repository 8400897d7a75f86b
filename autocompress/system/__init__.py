"""This machine and this process: limits, signals, files that are written, what goes wrong, and what keeps libraries quiet and quick."""
