"""The plan of a run, for people and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron.config.deepspeed_json import deepspeed_config
from megatron.launch.command import Command
from megatron.launch.resolution import Resolved
from megatron.plan import make_plan

SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def as_json(resolved: Resolved, command: Command) -> str:
    """Everything that a launch would use, as one JSON object."""
    resolution = resolved.resolution
    whole: dict[str, Any] = {
        "config": resolution.config.flat(),
        "origin": resolution.origin,
        "deepspeed": deepspeed_config(resolution.config),
        "launch": {"argv": list(command.argv), "env": redacted(command.environment)},
        "plan": make_plan(resolution).json(),
        "warnings": resolution.warnings,
        "not_supported_yet": resolution.not_supported_yet,
    }
    return json.dumps(whole, indent=2)


def redacted(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, without the values of those that may hold a secret."""
    return {name: "(redacted)" if SECRET.search(name) else value for name, value in environment.items()}


def as_text(resolved: Resolved) -> str:
    """The plan as lines for a person."""
    text = make_plan(resolved.resolution).text()
    shortage = resolved.machines.shortage
    return text if shortage is None else f"{text}Cannot start here\n  - {shortage}\n"
