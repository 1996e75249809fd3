#!/usr/bin/env python
"""A live page of one or more runs: losses, learning rate, gradient norm, speed, memory, ranks, and what differs.

    python tools/dashboard.py RUN_DIR [RUN_DIR ...] [--port 8080]     serves the page to this machine
    python tools/dashboard.py RUN_DIR [RUN_DIR ...] -o page.html      writes it as one file

A run directory is the `log_dir` of a run, or its `save` folder. Nothing is sent anywhere; on a remote machine forward
the port: ssh -L 8080:localhost:8080 HOST.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.dashboard.page import server, static_page
from megatron.dashboard.runs import open_runs
from megatron.errors import ConfigError
from megatron.output_streams import run_tool


def main(arguments: list[str]) -> int:
    """Serves or writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (this machine only)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-o", "--output", type=Path, help="write the page there instead of serving it")
    chosen = parser.parse_args(arguments)
    try:
        runs = open_runs(chosen.folders)
        if chosen.output is not None:
            chosen.output.write_text(static_page(runs), encoding="utf-8")
            print(chosen.output)
            return 0
        with server(runs, chosen.host, chosen.port) as serving:
            print(f"http://{chosen.host}:{serving.server_address[1]}/  (Ctrl-C ends it)", flush=True)
            serving.serve_forever()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
