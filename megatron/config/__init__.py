"""What a YAML may say, and how files and flags become one frozen Config."""

from megatron.config.cluster import Resources
from megatron.config.config import CATALOG, Config
from megatron.config.resolve import Resolution, resolve

__all__ = ["CATALOG", "Config", "Resolution", "Resources", "resolve"]
