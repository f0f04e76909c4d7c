"""The steps of a run, in order: prepare, fit, score, evaluate, write, show."""
