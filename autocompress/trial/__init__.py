"""One policy, from recipe to measured artifact, and the original that it is held against."""
