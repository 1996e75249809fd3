"""The names that other programs and earlier runs rely on, as the source spells them.

They are files on disk, command-line flags, metrics, exit codes, configuration keys, and names and shapes of parameters.
interface.json lists those that must stay; `python -m tests.contracts.interface` prints those of today.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megatron.config import Resources, resolve
from megatron.config.config import FIELDS
from megatron.param_table import ModelDims, tensors

ROOT = Path(__file__).resolve().parents[2]
A_FILE = re.compile(r"[\w{}./*-]*\.(?:jsonl?|pt|npy|png|bin|idx|journal|safetensors|partial|index|html|npz)")
A_FLAG = re.compile(r"--?[\w-]+")
A_METRIC = re.compile(r"(?:train|validation|test|runtime|optimizer|gradient|weights|noise_scale|eval)[\w{}]*/[\w{}/]+")
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_batch_size": 2,
    "train_iters": 2,
    "data_path": "corpus",
    "lr": 1.0e-3,
}
MODELS = {
    "gpt": {"pos_emb": "learned", "norm": "layernorm", "activation": "gelu"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
    "experts": {"moe_num_experts": 2, "moe_router_type": "topk"},
    "mamba": {"attention_config": ["mamba", "mamba"], "pos_emb": "none"},
    "rwkv": {"attention_config": ["rwkv", "rwkv"], "pos_emb": "none"},
    "lora": {"lora": {"rank": 4, "targets": "all"}},
}


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a file; what an f-string puts in is `{}`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def flags(tree: ast.AST) -> Iterator[str]:
    """The flags that a parser of this file declares."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield from (text for argument in node.args for text in texts(argument) if A_FLAG.fullmatch(text))


def exit_codes(tree: ast.AST) -> Iterator[int]:
    """Integers that constants and class attributes about exit codes hold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = " ".join(ast.unparse(target).lower() for target in targets)
            if isinstance(node.value.value, int) and re.search(r"exit|interrupted", names):
                yield node.value.value


def parameters() -> dict[str, list[object]]:
    """Model and key -> shape and sharded dimension."""
    found: dict[str, list[object]] = {}
    for name, keys in MODELS.items():
        config = resolve([], SMALL | keys, Resources(1)).config
        dims = ModelDims.of(config.model, config.moe, config.mixers)
        for each in tensors(dims, 128):
            found[f"{name} {each.layer}.{each.name}"] = [list(each.shape), each.shard_dim]
    return found


def interface() -> dict[str, object]:
    """All of it."""
    paths = [path for folder in ("megatron", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [*paths, *sorted(ROOT.glob("*.py"))]]
    every = {text for tree in trees for text in texts(tree)}
    return {
        "files": sorted(text for text in every if A_FILE.fullmatch(text) and not text.startswith(("{}.", ".{}"))),
        "flags": sorted({flag for tree in trees for flag in flags(tree)}),
        "metrics": sorted(text for text in every if A_METRIC.fullmatch(text)),
        "exit_codes": sorted({code for tree in trees for code in exit_codes(tree)}),
        "keys": sorted(FIELDS),
        "parameters": parameters(),
    }


if __name__ == "__main__":
    print(json.dumps(interface(), indent=1))
