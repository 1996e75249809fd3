#!/usr/bin/env bash
# transformers 5.23.0: where two shards of a folder hold a tensor of the same name, the index (`weight_map` of
# model.safetensors.index.json) does not decide which of them is loaded: the last file by name does, without a warning.
# Such folders arise where a tool adds a shard with changed tensors and edits the index alone.
# Seen: the index names the first shard for lm_head.weight (zeros), the second one has an old copy (ones), and ones are
# loaded. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0

cat > "$work/check.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
folder = Path(sys.argv[1])
sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, pad_token_id=None)).save_pretrained(folder)
weights = load_file(folder / "model.safetensors")
(folder / "model.safetensors").unlink()
shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
head = "lm_head.weight"
save_file({head: torch.zeros_like(weights[head])}, folder / shards[0], {"format": "pt"})
save_file({**weights, head: torch.ones_like(weights[head])}, folder / shards[1], {"format": "pt"})
index = {name: shards[0] if name == head else shards[1] for name in weights}
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
loaded = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
print(f"transformers {transformers.__version__}: the index names {index[head]} (zeros); loaded: {loaded.unique().tolist()}")
raise SystemExit(loaded.unique().tolist() != [1.0])
PY
"$work/venv/bin/python" "$work/check.py" "$work/folder"
