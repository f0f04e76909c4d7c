"""What a forward pass does: its calls, their dependences, and where the samples are in each tensor."""
