"""Policies before they are trained: drawn, predicted, appraised, and what they lose as far as losses add up."""
