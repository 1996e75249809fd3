#!/usr/bin/env python3
"""Starts workers: ./deepy.py SCRIPT CONF... [--KEY VALUE ...]; ./deepy.py --help says more."""

import sys

from megatron.launch.start import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
