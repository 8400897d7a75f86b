"""Which policies are better than others: fronts, scores, rank correlations, and who is worth more time."""
