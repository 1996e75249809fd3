"""Configuration: YAML files and flags become one frozen Config."""

from megatron.config.cluster import Resources
from megatron.config.config import FIELDS, Config
from megatron.config.resolve import Resolution, resolve

__all__ = ["FIELDS", "Config", "Resolution", "Resources", "resolve"]
