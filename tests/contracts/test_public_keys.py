"""Every key of the public interface is accepted, with its type, choices and default."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import FIELDS
from megatron.config.type_names import allows_type, union_members

PUBLIC: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "public_keys.json").read_text())

PLAIN = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "list": tuple, "List": tuple}

OTHER_DEFAULTS = {"gradient_accumulation_steps": None, "maximum_tokens": None}
"""Listed in docs/differences.md: what they are depends on something else."""

NEW = {
    "context_parallel_size",
    "reset_attention_mask",
    "reset_position_ids",
    "train_samples",
    "lr_decay_samples",
    "rampup_batch_size",
    "exit_duration",
    "on_nan",
    "loss_spike_factor",
    "log_norms_by",
    "warmup_iters",
    "wsd_decay_fraction",
    "wsd_decay_style",
    "infinite_constant_lr",
    "infinite_cooldown_fraction",
    "infinite_anneal_fraction",
    "power_amplitude",
    "power_exponent",
    "deterministic",
    "vocab_size",
    "kv_channels",
    "min_p",
    "generation_batch_size",
    "num_speculative_tokens",
    "serve_host",
    "serve_port",
    "serve_key",
    "serve_max_waiting",
    "eval_chat_template",
    "eval_cache_requests",
    "eval_cloze",
    "eval_overlap",
    "eval_metadata",
    "repetition_penalty",
    "stop",
    "gpu_memory",
    "load_fallback",
    "checkpoint_async",
    "strict_config",
    "collective_timeout",
    "max_restarts",
    "compile",
    "rope_scaling",
    "recompute_granularity",
    "recompute_method",
    "lora",
    "mup_base_widths",
}


def test_the_table_is_full() -> None:
    assert len(PUBLIC) == 318


@pytest.mark.parametrize("name", PUBLIC)
def test_public_key(name: str) -> None:
    facts, public = FIELDS[name], PUBLIC[name]
    assert facts.default == OTHER_DEFAULTS.get(name, public["default"])
    assert type(facts.default) is type(OTHER_DEFAULTS.get(name, public["default"]))
    assert set(public.get("choices", ())) <= set(facts.choices) or not public.get("choices")
    for kind in public_types(public["type"]):
        assert allows_type(facts.annotation, kind), f"{name} does not take a {kind.__name__}"
    if public["default"] is None:
        assert type(None) in union_members(facts.annotation) or facts.annotation is Any


def public_types(written: str) -> set[type]:
    """The plain types in a written annotation; the literals of a Literal count as text."""
    if written == "Any":
        return set()
    found: set[type] = set()

    def visit(node: ast.expr) -> None:
        if isinstance(node, ast.Name):
            found.add(PLAIN[node.id])
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            if node.value.id == "Literal":
                found.add(str)
            elif node.value.id == "List":
                found.add(tuple)
            else:
                inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                for part in inner:
                    visit(part)

    visit(ast.parse(written, mode="eval").body)
    return found


def test_types_are_read_from_annotations() -> None:
    assert public_types("Union[int, List[int], Literal['all']]") == {int, tuple, str}
    assert public_types("Optional[str]") == {str}


def test_new_keys_are_there_and_not_public() -> None:
    assert FIELDS.keys() >= NEW
    assert not NEW & PUBLIC.keys()


def test_every_other_key_is_reported_in_differences() -> None:
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text()
    untold = [name for name in FIELDS if name not in PUBLIC and f"`{name}`" not in page]
    assert untold == []
    assert [name for name in OTHER_DEFAULTS if f"`{name}`" not in page] == []


def test_new_keys_are_reported_with_their_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text()
    for name in FIELDS.keys() - PUBLIC.keys():
        assert f"| `{name}` | `{json.dumps(FIELDS[name].default)}` |" in page, name
