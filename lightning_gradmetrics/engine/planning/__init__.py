"""The first batch of a model: it is probed, planned, and the plan is verified."""
