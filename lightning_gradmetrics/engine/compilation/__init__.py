"""Compiled plans (``compile=True``) and the guards that decide whether they still hold."""
