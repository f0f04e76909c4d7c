"""The steps of a run, in order: prepare, fit, score, draw, evaluate, write, show."""
