"""Interfaces of other packages, implemented on this package's engine."""
