"""Which script makes the neighbours that a model with retrieval reads."""

from __future__ import annotations

BUILD_NEIGHBORS = "build_retro_database.py"
"""Reads the configuration of a training run, and does not train."""
GENERATE = "generate.py"
"""Finds neighbours while a text grows."""
