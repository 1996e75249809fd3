#!/usr/bin/env python
"""Prepares a corpus by name: `python prepare_data.py --help`. The work is done by tools/prepare_data.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "tools" / "prepare_data.py"), run_name="__main__")
