"""Where metric records go; one file a kind, each named in the registry's SINKS."""
