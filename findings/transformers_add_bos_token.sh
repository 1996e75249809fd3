#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0: `add_bos_token: true` in tokenizer_config.json of class LlamaTokenizerFast, beside a
# tokenizer.json whose post-processor adds nothing. Release 4 rebuilds the post-processor from the key; release 5 lets
# tokenizer.json decide and drops the key without a word, so the same folder begins texts with <s> in one release and
# without it in the other.
# Seen: ids of "a" are [2, 0] with 4.57.6 and [0] with 5.23.0. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/check.py" <<'PY'
import json
import pathlib
import sys

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "<s>": 2, "</s>": 3}, unk_token="[UNK]"))
made.add_special_tokens(["<s>", "</s>"])
made.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": sys.argv[2], "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
print(AutoTokenizer.from_pretrained(folder)("a")["input_ids"])
PY
for release in 4.57.6 5.23.0; do
  python3 -m venv "$work/$release"
  "$work/$release/bin/pip" install --quiet --disable-pip-version-check "transformers==$release"
done
four=$("$work/4.57.6/bin/python" "$work/check.py" "$work/a" LlamaTokenizerFast 2>/dev/null)
five=$("$work/5.23.0/bin/python" "$work/check.py" "$work/b" LlamaTokenizerFast 2>/dev/null)
echo "4.57.6: $four"
echo "5.23.0: $five"
[ "$four" = "[2, 0]" ] && [ "$five" = "[0]" ]
