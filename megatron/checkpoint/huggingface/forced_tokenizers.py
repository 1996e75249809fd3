"""Model types whose tokenizer `AutoTokenizer` of transformers 5 builds by a class, whatever the folder says.

The class takes vocabulary and merges of tokenizer.json, and has a normalizer (NFC) and a pre-tokenizer of its own. With
those of Qwen in the file nothing changes; a tokenizer that was trained otherwise gives other ids there.

Source: transformers 5.23, models/auto/tokenization_auto.py (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS) and the classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.checkpoint.format.files import read_json
from megatron.tokenizer_info import QWEN2, QWEN3_5

FORCED = {
    "qwen2": ("Qwen2Tokenizer", QWEN2),
    "qwen3_5": ("Qwen3_5Tokenizer", QWEN3_5),
    "qwen3_5_moe": ("Qwen3_5Tokenizer", QWEN3_5),
    "qwen3_5_moe_text": ("Qwen3_5Tokenizer", QWEN3_5),
}
"""model_type -> the class, and the pattern of its pre-tokenizer."""


def other_ids(folder: Path) -> str | None:
    """Returns a line where `AutoTokenizer` gives other ids than the tokenizer.json of a folder, else None."""
    config, tokenizer = folder / "config.json", folder / "tokenizer.json"
    if not (config.is_file() and tokenizer.is_file()):
        return None
    kind = str(read_json(config).get("model_type"))
    if kind not in FORCED or _is_of_class(read_json(tokenizer), FORCED[kind][1]):
        return None
    return (
        f"AutoTokenizer of transformers 5 reads the tokenizer of a {kind} by the class {FORCED[kind][0]}, which has "
        f"another normalizer or pre-tokenizer than {tokenizer}, so some texts get other ids there; "
        f"transformers.PreTrainedTokenizerFast.from_pretrained('{folder}') reads the file as it is"
    )


def _is_of_class(tokenizer: dict[str, Any], pattern: str) -> bool:
    parts = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    first, last = parts[0], parts[-1]
    splits = first.get("pattern") == {"Regex": pattern} and first.get("behavior") == "Isolated"
    levels = last.get("type") == "ByteLevel" and not last.get("use_regex") and not last.get("add_prefix_space")
    normalizer = tokenizer.get("normalizer") or {}
    return len(parts) == 2 and splits and levels and normalizer.get("type") == "NFC"
