"""The interfaces of other packages on this package's engine."""
