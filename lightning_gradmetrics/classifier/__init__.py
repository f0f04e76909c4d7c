"""Calling the user's model: batches, the forward pass, the head, and gradients with respect to the input."""
