"""Metrics sinks, one file each, listed in the registry's SINKS."""
