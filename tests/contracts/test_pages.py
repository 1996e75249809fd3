"""What the pages promise of the configuration and quote of messages, compared with the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.config.config import FIELDS
from megatron.config.validation.unsupported import GAPS
from megatron.registry import OBJECTIVES
from tests.architecture.source import PRODUCT, ROOT, Source

WORDS = 2
"""A stretch of a quoted message with fewer words says too little to be looked up."""
JOINTS = re.compile(r"^[\s(),:]*(s,)?\s*|[\s(),:]*( is| for)?\s*$")
"""What joins a stretch to a value beside it."""
OF_OTHERS = frozenset({"Gloo connectFullMesh failed"})
"""Messages of libraries."""


def test_the_readme_lists_what_is_not_supported_yet() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Not yet\n")[2]
    section = section.partition("\n\nA configuration that asks")[0]
    named = set(re.findall(r"`(\w+)`", section))
    objectives = set(FIELDS["train_impl"].choices) - set(OBJECTIVES.names)
    assert named == {gap.key for gap in GAPS} | {"train_impl"} | objectives


def test_the_pages_count_the_families_of_transformers() -> None:
    for page in ("README.md", "docs/features.md"):
        assert re.findall(r"(\d+) families", (ROOT / page).read_text())[0] == str(len(FAMILIES)), page


def messages(text: str) -> list[str]:
    """The messages that the first column of a page's table quotes."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return [span for span in spans if " " in span and "/" not in span and span not in OF_OTHERS]


def stretches(message: str) -> list[str]:
    """The literal stretches of a message: between ellipses, and single capitals that stand for values."""
    parts = (JOINTS.sub("", part) for part in re.split(r"\.\.\.|\b[A-Z]\b", message))
    return [part for part in parts if len(part.split()) >= WORDS]


def spoken(sources: Iterable[Source]) -> str:
    """Every text in sources, one a line; what f-strings fill in is an ellipsis."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_page_of_operations_quotes_messages_that_exist() -> None:
    quoted = messages((ROOT / "docs" / "operations.md").read_text())
    assert "the loss of iteration N is ..." in quoted
    source = spoken(source for source in PRODUCT if source.path.startswith("megatron/"))
    lost = [message for message in quoted if any(part not in source for part in stretches(message))]
    assert lost == []
    assert [message for message in quoted if not stretches(message)] == []


def test_a_message_that_nobody_says_is_found() -> None:
    page = "| you see | it means |\n|---|---|\n| `the loss of iteration N rose`, `ls -l` | `no message here` |\n"
    assert messages(page) == ["the loss of iteration N rose", "ls -l"]
    assert stretches("host X: the loss is ... for N s, standing at home") == ["the loss", "standing at home"]
