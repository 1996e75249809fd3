"""What LLaMA's class of `transformers` makes of a tokenizer.json, of which it takes vocabulary and merges alone.

Normalizer, pre-tokenizer and decoder are the class's own. Releases before 5, and every release under the class
PreTrainedTokenizerFast, keep to the file; so a folder that is given away under that class holds what this class reads.
A character that a vocabulary without bytes cannot spell stays the unknown token, which release 5 leaves out of the ids.

Source: transformers 5.23, models/llama/tokenization_llama.py.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_BLANK = "\u2581"
_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def rebuild(tokenizer: Tokenizer, blank: str | None) -> bool:
    """Gives the tokenizer the class's own parts. Whether it does: not without the class, nor with bytes as an alphabet.

    blank: where the class puts a blank before a text ("first", "always", "never"), None for other classes.
    """
    if blank is None or f'"{_BLANK}"' not in f"{tokenizer.normalizer!r}{tokenizer.pre_tokenizer!r}":
        return False
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, blank, split=False)
    steps: list[decoders.Decoder] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if blank == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = True
    return True


def as_read(content: str, blank: str | None) -> str:
    """The text of a tokenizer.json that says itself what the class reads; the same text where it does already."""
    if blank is None:
        return content
    tokenizer = Tokenizer.from_str(content)
    before = json.loads(tokenizer.to_str())
    if not rebuild(tokenizer, blank):
        return content
    after = json.loads(tokenizer.to_str())
    flags = {name: after["model"][name] for name in ("fuse_unk", "byte_fallback") if name in after["model"]}
    if all(before[part] == after[part] for part in _PARTS) and {**before["model"], **flags} == before["model"]:
        return content
    data = json.loads(content)
    data |= {part: after[part] for part in _PARTS} | {"model": {**data["model"], **flags}}
    return json.dumps(data, ensure_ascii=False, indent=2)
