"""Which checkpoint of a folder to read: the named one, the newest, or the newest that is whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from megatron.checkpoint.format import integrity, layout
from megatron.checkpoint.format.history import other_history
from megatron.checkpoint.remote.host_copy import Sharing, one_folder
from megatron.checkpoint.save.commit import recover
from megatron.distributed.process_group import all_gather_items, all_gather_list, barrier
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.log import get_logger

_log = get_logger(__name__)

FRESH, PREVIOUS = "fresh", "previous"


def candidates(load: Path, iteration: int | None) -> list[Path]:
    """Checkpoints that may be read, the one that is meant first, older ones after it.

    Empty when the folder holds none. Raises ConfigError for an iteration that is not there, RunError when `latest`
    names one that is not there and there is no other.
    """
    found = layout.iterations(load)
    if iteration is not None:
        if iteration not in found:
            raise ConfigError.of(
                f"there is no such checkpoint in {load}", key="iteration", value=iteration, hint=offer(found)
            )
        newest = iteration
    elif (load / layout.LATEST).is_file():
        return _from_pointer(load, found)
    elif not found:
        return []
    else:
        newest = found[-1]
    return [layout.step_directory(load, each) for each in reversed(found) if each <= newest]


def _from_pointer(load: Path, found: list[int]) -> list[Path]:
    """What the file `latest` names, then the older ones; public tools also write names that are bare numbers."""
    named = load / (load / layout.LATEST).read_text(encoding="utf-8", errors="replace").strip()
    newest = layout.iteration_of(named)
    older = [layout.step_directory(load, each) for each in reversed(found) if newest is None or each < newest]
    return [named, *older]


def find_intact(
    load: Path, iteration: int | None, fallback: str, *, repair: bool = False, sharing: Sharing | None = None
) -> Path | None:
    """The checkpoint to read; None when the folder holds none. Collective: every rank looks at its share of the files.

    Raises RunError that names each damaged file.

    Args:
        load: A save folder or one checkpoint.
        iteration: The iteration to read; the newest if None.
        fallback: `load_fallback`; "previous" takes the newest that is whole where the one that is meant is damaged.
        repair: A checkpoint that a crash left between two names gets its own back first; only where no other run saves
            there.
        sharing: Which ranks see the same folder, None for all.
    """
    sharing = sharing or one_folder()
    if repair and sharing.leads:
        with suppress(OSError):  # a folder that cannot be written is read as it is
            recover(load)
    if repair:
        barrier()
    meant = _on_all(candidates(load, iteration), sharing)
    for number, directory in enumerate(meant):
        errors = errors_of(directory, load, sharing)
        if not errors:
            if number:
                other = ", which is of another run than it" if other_history(directory, meant[0]) else ""
                _log.warning("going on from %s instead%s", directory, other)
            return directory
        if fallback != PREVIOUS or directory == meant[-1]:
            raise RunError(*_with_hint(errors, load, directory))
        for error in errors:
            _log.warning("%s", error)
    return None


def _on_all(found: list[Path], sharing: Sharing) -> list[Path]:
    """Those that every host has, where hosts have folders of their own; collective."""
    if len(sharing.groups) == 1:
        return found
    lists = all_gather_list([path.name for path in found])
    return [path for path in found if all(path.name in names for names in lists)]


def errors_of(directory: Path, load: Path, sharing: Sharing) -> list[ConfigIssue]:
    """What is wrong with a checkpoint, the same list on every rank; collective."""
    if not directory.is_dir() or directory == load:
        return [ConfigIssue("names a checkpoint that is not there", location=str(load / layout.LATEST))]
    if not integrity.is_ours(directory):
        empty = not layout.model_files(directory) and not layout.layer_files(directory)
        return [ConfigIssue("no weight files", location=str(directory))] if empty else []
    try:
        mine = integrity.damage(directory, contents=True, share=sharing.share)
    except RunError as error:
        mine = list(error.issues)
    return sorted(set(all_gather_items(mine)), key=str)


def offer(found: list[int]) -> str:
    """The hint that names the iterations there are."""
    if not found:
        return "the folder holds no checkpoints"
    return f"choose one with --iteration: {', '.join(map(str, found))}"


def _with_hint(errors: list[ConfigIssue], load: Path, damaged: Path) -> list[ConfigIssue]:
    others = [each for each in layout.iterations(load) if each != layout.iteration_of(damaged)]
    hint = offer(others) + (", or set load_fallback: previous" if others else "")
    return [ConfigIssue(error.message, location=error.location, hint=hint) for error in errors]
