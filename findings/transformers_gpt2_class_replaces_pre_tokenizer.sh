#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0: a tokenizer.json whose pre-tokenizer splits digits, under the class GPT2Tokenizer in
# tokenizer_config.json (the form in which SmolLM2 is given away). Release 4 keeps to the file; release 5 takes vocabulary
# and merges of it and puts the class's own pre-tokenizer in place of the file's, without a word. Under the class
# PreTrainedTokenizerFast both keep to the file.
# Seen: tokens of "2024" are 2 0 2 4 with 4.57.6 and 20 24 with 5.23.0. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/check.py" <<'PY'
import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
vocabulary = {"<|endoftext|>": 0, "0": 1, "2": 2, "4": 3, "20": 4, "24": 5}
made = Tokenizer(models.BPE(vocabulary, [("2", "0"), ("2", "4")]))
digits = pre_tokenizers.Digits(individual_digits=True)
made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
made.decoder = decoders.ByteLevel()
made.add_special_tokens(["<|endoftext|>"])
made.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": sys.argv[2], "eos_token": "<|endoftext|>"}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
print(*AutoTokenizer.from_pretrained(folder).tokenize("2024"))
PY
for release in 4.57.6 5.23.0; do
  python3 -m venv "$work/$release"
  "$work/$release/bin/pip" install --quiet --disable-pip-version-check "transformers==$release"
done
see() { "$work/$1/bin/python" "$work/check.py" "$work/$1-$2" "$2" 2>/dev/null; }
four=$(see 4.57.6 GPT2Tokenizer)
five=$(see 5.23.0 GPT2Tokenizer)
plain=$(see 5.23.0 PreTrainedTokenizerFast)
echo "4.57.6: $four"
echo "5.23.0: $five"
echo "5.23.0 under PreTrainedTokenizerFast: $plain"
[ "$four" = "2 0 2 4" ] && [ "$five" = "20 24" ] && [ "$plain" = "2 0 2 4" ]
