"""Parses deepy.py's command line: script, configuration files, keys and switches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.flags import read_flags
from megatron.config.yaml_loader import COMMAND_LINE
from megatron.errors import ConfigError, ConfigIssue

USAGE = """\
usage: ./deepy.py SCRIPT [-d DIR] CONF [CONF ...] [--KEY VALUE ...]

  SCRIPT     train.py, generate.py, evaluate.py, or a tool that runs as a worker
  CONF       YAML or JSON files, merged; the suffix .yml may be left out
  -d DIR     folder of the CONF files
  --KEY      every configuration key is a flag, such as --train-iters 100 (configs/README.md lists them)
  -i, -o, -H short for --sample-input-file, --sample-output-file, --hostfile
  --eval_tasks TASK ...    tasks to evaluate
  --autotuning tune|run    DeepSpeed's autotuner
  --dry-run  resolve the configuration, print the plan and stop; with --json, as one JSON object
  --strict-config          warnings about the configuration are errors
"""
WORKER_MARK = "megatron.launcher.worker"
CHECKOUT = Path(__file__).resolve().parents[2]
SHORT_FLAGS = {
    "-i": "--sample_input_file",
    "-o": "--sample_output_file",
    "-H": "--hostfile",
    "-d": "--conf_dir",
    "-h": "--help",
}
OWN_SWITCHES = ("dry_run", "json", "help")
OWN_VALUES = ("conf_dir", "autotuning")
AUTOTUNING = ("tune", "run")


@dataclass(frozen=True)
class LaunchRequest:
    """A parsed command line."""

    script: Path
    """The worker script."""
    files: tuple[str, ...]
    """Configuration files."""
    flags: dict[str, Any]
    """Key -> value."""
    dry_run: bool = False
    """Whether to print the plan only."""
    as_json: bool = False
    """Whether to print it as JSON."""
    arguments: tuple[str, ...] = ()
    """The command line, for launches.jsonl."""
    issues: tuple[ConfigIssue, ...] = ()
    """Errors of flags, reported together with those of the files."""


def wants_help(arguments: Sequence[str]) -> bool:
    """Returns whether the command line asks for help, or is empty."""
    return not arguments or "-h" in arguments or "--help" in arguments


def read_request(arguments: Sequence[str]) -> LaunchRequest:
    """Parses deepy.py's command line. Raises ConfigError when it has no valid script."""
    own = _own_flags(arguments)
    flags = read_flags(own.rest)
    unknown = [word for word in flags.rest if word.startswith("-")]
    issues = [*own.issues, *flags.issues]
    what, hint = "there is no such flag", "./deepy.py --help"
    issues += [ConfigIssue(what, word, location=COMMAND_LINE, hint=hint) for word in unknown]
    words = [word for word in flags.rest if word not in unknown]
    if not words:
        issue = ConfigIssue("no script is named", location=COMMAND_LINE, hint="./deepy.py train.py CONF ...")
        raise ConfigError(*issues, issue)
    script, *files = words
    try:
        path = find_script(script)
    except ConfigError as error:
        raise ConfigError(*issues, *error.issues) from error
    chosen = {**flags.values, "user_script": script}
    if "autotuning" in own.values:
        if own.values["autotuning"] not in AUTOTUNING:
            what = "this is tune or run"
            issues.append(ConfigIssue(what, "--autotuning", own.values["autotuning"], location=COMMAND_LINE))
        chosen["autotuning_run"] = own.values["autotuning"]
    folder = own.values.get("conf_dir")
    named = tuple(name if folder is None else str(Path(folder) / name) for name in files)
    switches = own.switches
    return LaunchRequest(
        path, named, chosen, "dry_run" in switches, "json" in switches, tuple(arguments), tuple(issues)
    )


@dataclass
class _OwnFlags:
    """Flags that are no configuration key."""

    switches: set[str] = field(default_factory=set)
    """Flags without a value."""
    values: dict[str, str] = field(default_factory=dict)
    """Flags with a value."""
    rest: list[str] = field(default_factory=list)
    """All other arguments."""
    issues: list[ConfigIssue] = field(default_factory=list)
    """Errors of these flags."""


def _own_flags(arguments: Sequence[str]) -> _OwnFlags:
    found = _OwnFlags()
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        argument = SHORT_FLAGS.get(argument, argument)
        written, equals, text = argument.partition("=")
        name = written[2:].replace("-", "_") if written.startswith("--") else ""
        if name in OWN_SWITCHES and not equals:
            found.switches.add(name)
        elif name in OWN_VALUES:
            if equals or waiting:
                found.values[name] = text if equals else waiting.pop(0)
            else:
                found.issues.append(ConfigIssue("the flag needs a value", written, location=COMMAND_LINE))
        else:
            found.rest.append(argument)
    return found


def find_script(name: str) -> Path:
    """Returns the worker script of that name, in this folder or the checkout. Raises ConfigError when there is none."""
    tried = [Path(name), Path(f"{name}.py"), CHECKOUT / name, CHECKOUT / f"{name}.py"]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        hint = "evaluate.py evaluates" if Path(name).name == "eval.py" else "train.py, generate.py or evaluate.py"
        raise ConfigError.of("there is no such script", key="SCRIPT", value=name, hint=hint)
    if found.suffix != ".py":
        raise ConfigError.of(
            "the script comes first, then the configuration files",
            key="SCRIPT",
            value=name,
            hint="./deepy.py train.py CONF ...",
        )
    if WORKER_MARK not in found.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError.of(
            f"the script is no worker: it does not use {WORKER_MARK}",
            key="SCRIPT",
            value=name,
            hint=f"run it directly: python {name}",
        )
    return found.resolve()
