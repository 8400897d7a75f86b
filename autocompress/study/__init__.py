"""All that Optuna keeps and suggests: the database, the journal in it, and the sampler."""
