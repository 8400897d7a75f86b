"""The search: which policy comes next, what was found, and how it ends."""
