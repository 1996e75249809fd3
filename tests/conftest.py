"""What every test shares: nothing heavy, so that a test which needs no torch starts at once."""

from __future__ import annotations

import os

# Tests share few cores; numpy and torch read this when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
