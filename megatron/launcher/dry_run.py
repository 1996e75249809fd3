"""Formats the plan of a run, as text and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron.config import Resolution
from megatron.config.deepspeed_config import deepspeed_config
from megatron.config.secrets import REDACTED, SECRETS
from megatron.launcher.commands.local import Command
from megatron.launcher.resolve import Resolved
from megatron.plan import make_plan

HIDDEN = frozenset(("config_files", "user_script"))
MAX_WIDTH = 80
SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def as_json(resolved: Resolved, command: Command) -> str:
    """Formats all inputs of a launch as one JSON object."""
    resolution = resolved.resolution
    report: dict[str, Any] = {
        "config": {name: _redact(name, value) for name, value in resolution.config.flat().items()},
        "origin": resolution.origin,
        "deepspeed": deepspeed_config(resolution.config),
        "launch": {"argv": list(command.argv), "env": redact_environment(command.environment)},
        "plan": make_plan(resolution).json(),
        "warnings": resolution.warnings,
        "not_supported_yet": resolution.not_supported_yet,
    }
    return json.dumps(report, indent=2)


def redact_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables, without values that may be secrets."""
    return {name: REDACTED if SECRET.search(name) else value for name, value in environment.items()}


def as_text(resolved: Resolved) -> str:
    """Formats the plan as text."""
    text = make_plan(resolved.resolution).text()
    shortage = resolved.machines.shortage
    return text if shortage is None else f"{text}Cannot start here\n  - {shortage}\n"


def values_as_text(resolution: Resolution) -> str:
    """Formats every value that is not a default, with its origin."""
    values = resolution.config.flat()
    origin = {name: source for name, source in resolution.origin.items() if source != "default" and name not in HIDDEN}
    width = max(map(len, origin), default=0)
    lines = [
        f"  {name:<{width}}  {_format_value(_redact(name, values[name]))}  ({source})"
        for name, source in origin.items()
    ]
    return "\n".join([f"Values given or derived ({len(lines)})", *lines]) + "\n"


def _redact(key: str, value: Any) -> Any:
    return REDACTED if key in SECRETS and value is not None else value


def _format_value(value: Any) -> str:
    """Formats a value like YAML, truncated to the width of a terminal."""
    if isinstance(value, tuple) and len(value) > 1 and len(set(map(repr, value))) == 1:
        return f"{len(value)} x {_format_value(value[0])}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_WIDTH else f"{text[:MAX_WIDTH]}..."
