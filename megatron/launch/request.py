"""argv -> Request: which script, which configuration files, which keys, and what to do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.flags import read_flags
from megatron.errors import ConfigError

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
WORKER_MARK = "megatron.launch.worker"
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
class Request:
    """What one command line asks for. arguments: the command line itself, for the record."""

    script: Path
    files: tuple[str, ...]
    flags: dict[str, Any]
    dry_run: bool = False
    as_json: bool = False
    arguments: tuple[str, ...] = ()


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks how to write it, or says nothing at all."""
    return not arguments or "-h" in arguments or "--help" in arguments


def read_request(arguments: Sequence[str]) -> Request:
    """Reads deepy.py's command line. Raises ConfigError for an unknown flag, script or form."""
    switches, values, rest = _own_flags(arguments)
    flags = read_flags(rest)
    if not flags.rest:
        raise ConfigError.of("no script is named", where="command line", remedy="./deepy.py train.py CONF ...")
    script, *files = flags.rest
    unknown = [word for word in flags.rest if word.startswith("-")]
    if unknown:
        raise ConfigError.of("there is no such flag", key=unknown[0], where="command line", remedy="./deepy.py --help")
    chosen = dict(flags.values)
    path = find_script(script)
    chosen["user_script"] = script
    if "autotuning" in values:
        if values["autotuning"] not in AUTOTUNING:
            raise ConfigError.of("this is tune or run", key="--autotuning", value=values["autotuning"])
        chosen["autotuning_run"] = values["autotuning"]
    folder = values.get("conf_dir")
    named = tuple(name if folder is None else str(Path(folder) / name) for name in files)
    return Request(path, named, chosen, "dry_run" in switches, "json" in switches, tuple(arguments))


def _own_flags(arguments: Sequence[str]) -> tuple[set[str], dict[str, str], list[str]]:
    """The flags that are no configuration key, with their values, and all other arguments."""
    switches: set[str] = set()
    values: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        argument = SHORT_FLAGS.get(argument, argument)
        written, equals, text = argument.partition("=")
        name = written[2:].replace("-", "_") if written.startswith("--") else ""
        if name in OWN_SWITCHES and not equals:
            switches.add(name)
        elif name in OWN_VALUES:
            if not equals and not waiting:
                raise ConfigError.of("the flag needs a value", key=written, where="command line")
            values[name] = text if equals else waiting.pop(0)
        else:
            rest.append(argument)
    return switches, values, rest


def find_script(name: str) -> Path:
    """The worker script of that name, here or in the checkout. Raises ConfigError where it is none."""
    tried = [Path(name), Path(f"{name}.py"), CHECKOUT / name, CHECKOUT / f"{name}.py"]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        remedy = "evaluate.py evaluates" if Path(name).name == "eval.py" else "train.py, generate.py or evaluate.py"
        raise ConfigError.of("there is no such script", key="SCRIPT", value=name, remedy=remedy)
    if found.suffix != ".py":
        raise ConfigError.of(
            "the script comes first, then the configuration files",
            key="SCRIPT",
            value=name,
            remedy="./deepy.py train.py CONF ...",
        )
    if WORKER_MARK not in found.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError.of(
            f"the script is no worker: it does not use {WORKER_MARK}",
            key="SCRIPT",
            value=name,
            remedy=f"run it directly: python {name}",
        )
    return found.resolve()
