"""The plan of a run, for people and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron.config import Resolution
from megatron.config.deepspeed_config import deepspeed_config
from megatron.launcher.commands.local import Command
from megatron.launcher.resolve import Resolved
from megatron.plan import make_plan

SECRETS = frozenset(("serve_key",))
UNSHOWN = frozenset(("config_files", "user_script"))
WIDEST = 80
SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def as_json(resolved: Resolved, command: Command) -> str:
    """Everything that a launch would use, as one JSON object."""
    resolution = resolved.resolution
    whole: dict[str, Any] = {
        "config": {name: _redacted(name, value) for name, value in resolution.config.flat().items()},
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


def values_as_text(resolution: Resolution) -> str:
    """Every value that was given or derived, and where it comes from; all others are defaults."""
    values = resolution.config.flat()
    origin = {name: told for name, told in resolution.origin.items() if told != "default" and name not in UNSHOWN}
    width = max(map(len, origin), default=0)
    lines = [f"  {name:<{width}}  {_shown(_redacted(name, values[name]))}  ({told})" for name, told in origin.items()]
    return "\n".join([f"Values given or derived ({len(lines)})", *lines]) + "\n"


def _redacted(key: str, value: Any) -> Any:
    return "(redacted)" if key in SECRETS and value is not None else value


def _shown(value: Any) -> str:
    """The value as YAML would have it, in a width that a terminal has."""
    if isinstance(value, tuple) and len(value) > 1 and len(set(map(repr, value))) == 1:
        return f"{len(value)} x {_shown(value[0])}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}..."
