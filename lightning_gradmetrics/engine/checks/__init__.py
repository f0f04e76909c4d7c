"""Checks of a batch: samples that depend on each other, and gradients compared with autograd."""
