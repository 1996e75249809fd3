"""Laws of who may know whom: floors, circles, and rooms that stay free of heavy packages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from tests.architecture.source import PRODUCT, ROOT, Source, imports, sample

# A room may import only rooms on strictly lower floors. The map with the reasons is megatron/README.md.
FLOORS = {
    "errors": 0,
    "ranks": 0,
    "adapter_config": 1,
    "atomic": 1,
    "extensions_dir": 1,
    "log": 1,
    "registry": 1,
    "block_sparsity": 1,
    "expert_blocks": 1,
    "retro_blocks": 1,
    "layer_types": 1,
    "output_blocks": 1,
    "output_streams": 1,
    "sequence_parts": 1,
    "pipe_schedule": 1,
    "tokenizer_info": 1,
    "config": 2,
    "kernels": 2,
    "param_table": 2,
    "distributed": 3,
    "checkpoint": 4,
    "data": 4,
    "model": 4,
    "health": 4,
    "metrics": 4,
    "optim": 4,
    "plan": 4,
    "tokenizers": 4,
    "launcher": 5,
    "dashboard": 5,
    "objectives": 5,
    "engine": 6,
    "inference": 7,
    "evaluation": 8,
    "retrieval": 8,
    "serving": 8,
    "training": 9,
}
ENTRY_POINT_FLOOR = 10

# What a room may import besides the standard library and lower floors; rooms not named here are free.
PACKAGES_OF = {
    "errors": frozenset(),
    "adapter_config": frozenset(),
    "atomic": frozenset(),
    "extensions_dir": frozenset(),
    "log": frozenset(),
    "registry": frozenset(),
    "block_sparsity": frozenset(),
    "expert_blocks": frozenset(),
    "retro_blocks": frozenset(),
    "layer_types": frozenset(),
    "output_blocks": frozenset(),
    "output_streams": frozenset(),
    "sequence_parts": frozenset(),
    "pipe_schedule": frozenset(),
    "tokenizer_info": frozenset(),
    "config": frozenset({"pydantic", "pydantic_core", "yaml"}),
    "param_table": frozenset(),
    "plan": frozenset(),
    "ranks": frozenset(),
    "launcher": frozenset(),
}
HEAVY = frozenset({"torch", "deepspeed", "transformers", "numpy"})


def room(module: str) -> str | None:
    """The room of a module of megatron; None for anything else, and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron" and len(parts) > 1 else None


def floor_complaints(sources: Sequence[Source]) -> list[str]:
    """Imports that go up or sideways, and rooms that have no floor."""
    modules = frozenset(source.module for source in sources)
    found = []
    for source in sources:
        mine = room(source.module)
        if mine is not None and mine not in FLOORS:
            found.append(source.complaint(source.tree, f"the room {mine} has no floor; place it here and on the map"))
            continue
        floor = ENTRY_POINT_FLOOR if mine is None else FLOORS[mine]
        for item in imports(source):
            theirs = room(item.target(modules))
            if theirs is None or theirs == mine:
                continue
            if theirs not in FLOORS:
                found.append(source.complaint(item.node, f"{theirs} is no room of megatron"))
            elif source.module == "megatron" or FLOORS[theirs] >= floor:
                found.append(
                    source.complaint(item.node, f"floor {floor} imports {theirs}, which is on floor {FLOORS[theirs]}")
                )
    return found


def entry_point_complaints(sources: Sequence[Source]) -> list[str]:
    """Returns imports of entry points: an entry point only calls a room.

    What several tools share may be in a file beside them, and so for benchmarks.
    """
    entry_points = {source.module for source in sources if source.is_entry_point}
    found = []
    for source in sources:
        for item in imports(source):
            target = item.target(frozenset(entry_points))
            folder = "tools" if source.path == "prepare_data.py" else source.path.split("/")[0]
            if target in entry_points and not target.startswith(f"{folder}."):
                found.append(source.complaint(item.node, f"imports the entry point {target}"))
    return found


def circles(sources: Sequence[Source]) -> list[str]:
    """Chains of imports that come back to their start."""
    modules = frozenset(source.module for source in sources)
    edges = {
        source.module: sorted({item.target(modules) for item in imports(source)} & modules - {source.module})
        for source in sources
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        if module in chain:
            found.append(" -> ".join((*chain[chain.index(module) :], module)))
        elif module not in done:
            for target in edges[module]:
                visit(target, (*chain, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    return found


def package_complaints(sources: Iterable[Source]) -> list[str]:
    """Packages imported by rooms that promise to do without them."""
    found = []
    for source in sources:
        allowed = PACKAGES_OF.get(room(source.module) or "")
        if allowed is None:
            continue
        found += [
            source.complaint(item.node, f"{room(source.module)} does without {item.top}")
            for item in imports(source)
            if item.top not in sys.stdlib_module_names | allowed | {"megatron"}
        ]
    return found


def reached(start: str, sources: Sequence[Source]) -> dict[str, str]:
    """Every top-level package that importing `start` may pull in, with the module that imports it."""
    by_module = {source.module: source for source in sources}
    modules = frozenset(by_module)
    packages: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in by_module:
            continue
        seen.add(module)
        waiting += [module.rpartition(".")[0]]  # a package's __init__ runs before its modules
        for item in imports(by_module[module]):
            packages.setdefault(item.top, module)
            waiting.append(item.target(modules))
    return packages


def test_imports_go_down() -> None:
    assert floor_complaints(PRODUCT) == []


def test_floor_law_sees_upward_sideways_local_and_type_checking_imports() -> None:
    engine = sample("megatron/engine/builder.py", "")
    up = "from megatron.engine.builder import x\n"
    assert floor_complaints([engine, sample("megatron/data/dataset/gpt_dataset.py", up)])
    assert floor_complaints([engine, sample("megatron/data/dataset/gpt_dataset.py", f"def f():\n    {up}")])
    assert floor_complaints([engine, sample("megatron/data/dataset/gpt_dataset.py", f"if TYPE_CHECKING:\n    {up}")])
    called = "import importlib\nimportlib.import_module('megatron.engine.builder')\n"
    assert floor_complaints([engine, sample("megatron/data/dataset/gpt_dataset.py", called)])
    package = sample("megatron/engine/__init__.py", "")
    assert floor_complaints([package, sample("megatron/data/dataset/gpt_dataset.py", "from megatron import engine\n")])
    assert floor_complaints([sample("megatron/data/dataset/gpt_dataset.py", "import megatron.model.block\n")])
    assert floor_complaints([sample("megatron/data/dataset/gpt_dataset.py", "from ...model import block\n")])
    assert floor_complaints([sample("megatron/stuff/x.py", "")])
    assert floor_complaints([engine, sample("megatron/training/trainer.py", up)]) == []
    assert floor_complaints([engine, sample("train.py", up)]) == []


def test_entry_points_are_not_imported() -> None:
    assert entry_point_complaints(PRODUCT) == []


def test_entry_point_law_can_complain() -> None:
    entry_points = [sample("train.py", "import generate\n"), sample("generate.py", ""), sample("tools/corpus.py", "")]
    assert entry_point_complaints(entry_points)
    assert entry_point_complaints(
        [*entry_points[1:], sample("megatron/data/dataset/gpt_dataset.py", "from tools import corpus\n")]
    )
    assert entry_point_complaints([*entry_points[1:], sample("benchmarks/step.py", "from tools.corpus import main\n")])
    assert (
        entry_point_complaints([*entry_points[1:], sample("tools/other.py", "from tools.corpus import main\n")]) == []
    )
    assert (
        entry_point_complaints([*entry_points[1:], sample("prepare_data.py", "from tools.corpus import main\n")]) == []
    )


def test_no_circles() -> None:
    assert circles(PRODUCT) == []


def test_circle_law_can_complain() -> None:
    one = sample("megatron/data/one.py", "from megatron.data import two\n")
    two = sample("megatron/data/two.py", "def f():\n    from megatron.data.one import g\n")
    assert circles([one, two]) == ["megatron.data.one -> megatron.data.two -> megatron.data.one"]
    assert circles([one, sample("megatron/data/two.py", "")]) == []


def test_light_rooms_stay_light() -> None:
    assert package_complaints(PRODUCT) == []


def test_light_room_law_can_complain() -> None:
    assert package_complaints([sample("megatron/config/validation/batch.py", "def f():\n    import torch.nn\n")])
    assert package_complaints([sample("megatron/launcher/cli.py", "from deepspeed.launcher import runner\n")])
    assert (
        package_complaints([sample("megatron/config/yaml_loader.py", "import yaml\nfrom megatron.errors import E\n")])
        == []
    )


def test_the_launcher_reaches_nothing_heavy() -> None:
    """`./deepy.py --dry-run` answers at once only as long as no import on its way needs torch."""
    packages = reached("deepy", PRODUCT)
    assert "megatron" in packages, "deepy.py is missing, or imports nothing of megatron"
    assert {name: packages[name] for name in HEAVY & packages.keys()} == {}


def test_reach_follows_packages_and_local_imports() -> None:
    chain = [
        sample("deepy.py", "def main():\n    from megatron.plan.memory import m\n"),
        sample("megatron/plan/__init__.py", "from megatron.plan.table import t\n"),
        sample("megatron/plan/memory.py", ""),
        sample("megatron/plan/table.py", "import torch\n"),
    ]
    assert reached("deepy", chain)["torch"] == "megatron.plan.table"


def rooms_on_the_map(text: str) -> dict[str, int]:
    """The table of floors as megatron/README.md has it."""
    found = {}
    for line in text.splitlines():
        row = re.match(r"\| (\d+) \| ([^|]+) \|", line)
        if row and int(row[1]) < ENTRY_POINT_FLOOR:
            found.update({name.removesuffix(".py"): int(row[1]) for name in re.findall(r"`([\w.]+)/?`", row[2])})
    return found


def test_the_map_reports_the_floors_of_all_rooms() -> None:
    reported = rooms_on_the_map((ROOT / "megatron/README.md").read_text(encoding="utf-8"))
    built = {room(source.module) for source in PRODUCT} - {None}
    assert reported == {name: floor for name, floor in FLOORS.items() if name in reported}
    assert built <= reported.keys()


def test_the_map_is_read() -> None:
    assert rooms_on_the_map("| 2 | `config/`, `param_table/` | x |\n| 10 | `train.py` | y |\n") == {
        "config": 2,
        "param_table": 2,
    }
