"""The samples in the inputs: which tensors have one row per sample, and which all samples share."""
