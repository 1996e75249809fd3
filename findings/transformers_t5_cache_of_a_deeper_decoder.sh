#!/usr/bin/env bash
# transformers 5.23.0: T5ForConditionalGeneration.generate raises IndexError where the decoder has more blocks than the
# encoder (`num_decoder_layers` above `num_layers`, which T5Config allows): the cache has as many layers as the encoder.
# With use_cache=False the same model writes text.
# Seen: 2 blocks in the encoder and 4 in the decoder. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0

cat > "$work/check.py" <<'PY'
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
torch.manual_seed(0)
model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2, num_decoder_layers=4)).eval()
text = torch.arange(2, 10)[None]
plain = model.generate(text, max_new_tokens=3, do_sample=False, use_cache=False)
try:
    model.generate(text, max_new_tokens=3, do_sample=False)
    found = "no error"
except IndexError as error:
    found = f"IndexError: {error}"
print(f"transformers {transformers.__version__}: without the cache {plain.shape[1]} tokens; with it {found}")
raise SystemExit(not found.startswith("IndexError"))
PY
"$work/venv/bin/python" "$work/check.py"
