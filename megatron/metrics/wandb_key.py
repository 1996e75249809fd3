"""Finds the user's key for Weights & Biases without importing its package."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse


def wandb_key(host: str) -> str | None:
    """Returns the key of a server: WANDB_API_KEY, the netrc entry of its host, or any text for a local one.

    host: the key wandb_host, such as https://api.wandb.ai.
    """
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    if "WANDB_LOCAL" in os.environ:
        return "local"
    name = urlparse(host).hostname or host
    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        found = netrc.netrc(str(path)).authenticators(name)
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: this user has no home folder
        return None
    return found[2] if found else None
