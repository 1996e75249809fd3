"""What a YAML may say, and how files and flags become one frozen Config."""

from megatron.config.config import CATALOG, Config
from megatron.config.resolve import Resolution, resolve
from megatron.config.resources import Resources

__all__ = ["CATALOG", "Config", "Resolution", "Resources", "resolve"]
