"""The detectors of pytorch-ood as fitted scores."""
