#!/usr/bin/env bash
# transformers 5.23.0: the tokenizer of a folder with a tokenizer.model, and LlamaTokenizer as its class, is built without
# the normalization that the sentencepiece model has in it (NFKC here, the default of sentencepiece's trainer). The model
# was trained on the ids of sentencepiece; those of AutoTokenizer are others, and there is no warning.
# Seen: for "ﬁne １２" sentencepiece has the ids of "fine 12", AutoTokenizer ids of bytes. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 sentencepiece==0.2.1 protobuf
cat > "$work/check.py" <<'PY'
import io
import json
import sys
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
folder.mkdir()
lines = ["a fine day in 12 towns", "the fine print of the 12 laws", "fine, 1 2 12 21 22 fine words"] * 50
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
    minloglevel=2, hard_vocab_limit=False,
)
(folder / "tokenizer.model").write_bytes(model.getvalue())
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
theirs = AutoTokenizer.from_pretrained(folder)
plain, wide = "fine 12", "\ufb01ne \uff11\uff12"


def ids(text: str) -> list[int]:
    return theirs(text, add_special_tokens=False)["input_ids"]


pieces = theirs.convert_ids_to_tokens(ids(wide))
print(
    f"sentencepiece alike {own.encode(wide) == own.encode(plain)}, transformers alike {ids(wide) == ids(plain)}, "
    f"plain text equal {ids(plain) == own.encode(plain)}, bytes {sum(piece.startswith('<0x') for piece in pieces)}"
)
PY
found=$("$work/env/bin/python" -W ignore "$work/check.py" "$work/folder" 2>/dev/null)
echo "$found"
[ "$found" = "sentencepiece alike True, transformers alike False, plain text equal True, bytes 9" ]
