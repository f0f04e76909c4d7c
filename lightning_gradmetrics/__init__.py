"""Per-sample gradient uncertainty scores for PyTorch Lightning."""
