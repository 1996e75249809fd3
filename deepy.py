#!/usr/bin/env python3
"""Starts workers: ./deepy.py SCRIPT CONF... [--KEY VALUE ...]; see ./deepy.py --help."""

import sys

try:
    from megatron.launcher.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"{sys.executable} has no package {error.name}; activate the environment: source .venv/bin/activate")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
