#!/usr/bin/env bash
# transformers 4.57.6: a Gemma 2 model takes sdpa attention unless asked otherwise, and that leaves out
# `attn_logit_softcapping`, which bounds the scores by 50 in the public models; only eager (and flash) attention applies it.
# transformers 5.23.0 takes eager attention for the class by itself.
# Seen: a random model with a bound of 1 and large queries: the logits of the default differ from eager ones by more than
# 0.05 in 4.57.6 and by nothing in 5.23.0. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/check.py" <<'PY'
import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

transformers.logging.set_verbosity_error()
sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
config = Gemma2Config(**sizes, head_dim=8, intermediate_size=64, attn_logit_softcapping=1.0, pad_token_id=0)
torch.manual_seed(0)
model = Gemma2ForCausalLM(config).eval()
for name, weight in model.named_parameters():
    if "q_proj" in name or "k_proj" in name:
        weight.data.normal_(0.0, 1.0)
    elif "proj" in name:
        weight.data.normal_(0.0, 0.3)
tokens = torch.randint(1, 64, (2, 24))
chosen = model.config._attn_implementation
with torch.no_grad():
    default = model(tokens).logits
    model.set_attn_implementation("eager")
    apart = (default - model(tokens).logits).abs().max().item()
print(f"transformers {transformers.__version__}: {chosen}, {apart:.3f} from eager attention")
raise SystemExit(not (apart > 0.05 if transformers.__version__ == "4.57.6" else apart < 1e-5))
PY
for version in 4.57.6 5.23.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  "$work/$version/bin/python" "$work/check.py"
done
