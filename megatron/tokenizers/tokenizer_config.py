"""What tokenizer_config.json says beside a tokenizer's own file, as `transformers` reads it.

Source: transformers 5.23, tokenization_utils_base.py and tokenization_utils_tokenizers.py: named tokens are special
whatever the tokenizer's file calls them, and `add_bos_token` counts only where there is no tokenizer.json, whose
post-processor says it otherwise. models/auto/tokenization_auto.py: the class is that of tokenizer_config.json, but for
model types of which it is known to be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
NAMES = "special_tokens_map.json"
TOKENIZER = "tokenizer.json"
FILE_CLASS = "PreTrainedTokenizerFast"
"""The class under which every release of `transformers` reads a tokenizer.json and nothing else."""
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
MODEL = "config.json"
_EVEN_FOR_MERGES = "_for_bpe_even_though_it_will_corrupt_output"
_LLAMA, _CODE_LLAMA = "LlamaTokenizer", "CodeLlamaTokenizer"
# fmt: off
_AS_WRITTEN = frozenset({
    "EvollaModel", "arctic", "aria", "beam", "bigbird_pegasus", "camembertv2-base", "canary", "chatlm",
    "cohere_asr", "ernie4_5", "ernie4_5_moe", "flex_olmo", "fuyu", "glm", "glm4", "glm4_moe", "glm4_moe_lite",
    "glm4v", "glm4v_moe", "glm_image", "glmasr", "got_ocr2", "gpt_bigcode", "gradium_phonon_tts", "granite",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "h2ovl_chat", "hyperclovax", "hyperclovax_vlm",
    "internlm2", "internlm3", "iquestcoder", "jamba", "kimi_k25", "kimi_linear", "kosmos-2", "llava", "llava_next",
    "mimo_v2_flash", "minicpm3", "minicpm_ocr", "minicpmv", "minicpmv4_6", "minicpmv4_7", "minimax_m2", "ministral",
    "ministral3", "mistral", "mistral3", "mistral_large4", "mixtral", "modernbert", "modernbert-decoder", "molmo",
    "molmo2", "nemo_speechlm", "nemotron", "nvfp4", "nystromformer", "olmo2", "olmo3", "olmo_hybrid", "opencua",
    "openvla", "paddleocr_vl", "pegasus_x", "persimmon", "phi3", "phi3_v", "phimoe", "pix2struct", "pixtral",
    "pocket_tts", "smolvlm", "stablelm", "step3_vl", "umt5", "vipllava", "voxtral", "voxtral_realtime",
    "xlm-roberta-xl",
})
# fmt: on
"""Model types whose tokenizer.json is read as it is written, whatever class is named beside it."""
# The begin and end tokens that a class has where the file names none.
_DEFAULTS = {
    _LLAMA: ("<s>", "</s>"),
    _CODE_LLAMA: ("<s>", "</s>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
}


@dataclass(frozen=True)
class Beside:
    """What the file says, with the defaults of the class that it names."""

    special: tuple[str, ...] = ()
    """The texts of special tokens, in the file's order."""
    begin: str | None = None
    """The tokens that begin and end a text."""
    end: str | None = None
    """The tokens that begin and end a text."""
    adds_begin: bool = False
    """Whether a tokenizer without a post-processor of its own puts it before a text."""
    splits_special: bool = False
    """Whether special tokens that a text spells are text, in prompts and chat templates too."""
    blank: str | None = None
    """How LLaMA's class puts a blank before a text ("first": before its very first word only), None for other classes.
    """


def read_beside(file: str | Path | None) -> Beside:
    """What is beside a tokenizer's file, or in a tokenizer_config.json; nothing where there is none."""
    found = read_settings(file)
    return Beside(
        special=tuple(dict.fromkeys(_special(found))),
        begin=token_text(found.get("bos_token")),
        end=token_text(found.get("eos_token")),
        adds_begin=found.get("add_bos_token") is True,
        splits_special=found.get("split_special_tokens") is True,
        blank=_blank(found),
    )


def unapplied_cleanup(folder: Path) -> str | None:
    """A line where `transformers` takes blanks out of decoded texts that this program leaves in, else None.

    `clean_up_tokenization_spaces` removes the blank before `.`, `,`, `?`, `!` and English short forms, but not with
    tokens made by merges. The decoder of a WordPiece file does the same by itself.
    Source: transformers 5.23, tokenization_utils_tokenizers.py (_decode).
    """
    content = read_object(folder / TOKENIZER)
    model, decoder = content.get("model") or {}, content.get("decoder") or {}
    forced = read_settings(folder / CONFIG)
    asked = forced.get("clean_up_tokenization_spaces") is True
    merges = model.get("type") == "BPE" and not forced.get(f"clean_up_tokenization_spaces{_EVEN_FOR_MERGES}")
    if not content or not asked or merges or decoder.get("cleanup"):
        return None
    return (
        f"{CONFIG}: clean_up_tokenization_spaces is not applied: transformers takes the blank before . , ? ! out of "
        "decoded texts, where they are as their tokens spell them here"
    )


def read_settings(file: str | Path | None) -> Mapping[str, Any]:
    """The tokenizer_config.json beside a tokenizer's file, or that file itself; empty where there is none.

    Earlier folders name their special tokens in special_tokens_map.json, which then goes before it. Begin and end
    tokens that it does not name are those of its class. Where the model's type says that a tokenizer.json is read as it
    is written, the class is that of such files.
    """
    if file is None:
        return {}
    path = Path(file)
    path = path if path.name == CONFIG else path.with_name(CONFIG)
    found = read_object(path)
    if "added_tokens_decoder" not in found:
        found = {**found, **read_object(path.with_name(NAMES))}
    if class_is_wrong(path.parent):
        found = {**found, "tokenizer_class": FILE_CLASS}
    begin, end = _DEFAULTS.get(_class(found), (None, None))
    return {"bos_token": begin, "eos_token": end, **found}


def class_is_wrong(folder: Path) -> bool:
    """Whether the folder's tokenizer.json is read as it is written, whatever class tokenizer_config.json names.

    A tokenizer.model alone is read by the class all the same.
    """
    written = (folder / TOKENIZER).is_file()
    return written and read_object(folder / MODEL).get("model_type") in _AS_WRITTEN


def retain_reading(source: Path, target: Path) -> None:
    """Names the class that counts in a copy of a folder's tokenizer, which has no config.json to tell it by."""
    if class_is_wrong(source):
        settings = {**read_object(target / CONFIG), "tokenizer_class": FILE_CLASS}
        (target / CONFIG).write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")


def read_object(path: Path | None) -> dict[str, Any]:
    """Returns the object in a JSON file of a tokenizer; nothing where there is none or it is no object."""
    try:
        found: Any = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def token_text(token: Any) -> str | None:
    """Return the text of a token that is written as text or as an object with `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def named_tokens(found: Mapping[str, Any]) -> Iterator[Any]:
    """The special tokens that a tokenizer_config.json names, as it describes them, those for one use first."""
    yield from tokens_of_one_use(found)
    for name in _LISTS:
        listed = found.get(name)
        yield from (token for token in listed if token_text(token) is not None) if isinstance(listed, list) else ()


def tokens_of_one_use(found: Mapping[str, Any]) -> Iterator[Any]:
    """The tokens that a tokenizer_config.json names for one use, such as `eos_token` and a model's `image_token`.

    They are special even where the tokenizer's file calls them ordinary.
    """
    more = [name for name in found if name.endswith("_token") and name not in _NAMES]
    listing = [found.get(name) for name in (*_NAMES, *more)]
    for name in _LISTS:
        listed = found.get(name)
        listing += listed.values() if isinstance(listed, Mapping) else ()
    return (token for token in listing if token_text(token) is not None)


def _special(found: Mapping[str, Any]) -> Iterator[str]:
    added = found.get("added_tokens_decoder")
    listed = added.values() if isinstance(added, Mapping) else ()
    listing = [
        *named_tokens(found),
        *(token for token in listed if isinstance(token, Mapping) and token.get("special")),
    ]
    return (text for text in map(token_text, listing) if text is not None)


def _class(found: Mapping[str, Any]) -> str:
    """The tokenizer's class; both of a pair, of which one is called fast, are the same by now."""
    return str(found.get("tokenizer_class")).removesuffix("Fast")


def _blank(found: Mapping[str, Any]) -> str | None:
    name = _class(found)
    if name not in (_LLAMA, _CODE_LLAMA):
        return None
    if found.get("add_prefix_space") is False:
        return "never"
    return "always" if found.get("legacy") is True and name == _LLAMA else "first"
