#!/usr/bin/env bash
# transformers 5.23.0: Mamba2ForCausalLM bounds the step size of a token by `time_step_limit` where it reads several tokens,
# and not where it reads one token from its cache. So with bounds that are reached, text from the cache is that of
# another model than the one that was trained. (The plain path, without mamba-ssm's kernels.)
# Seen: with the default bounds (0, infinity) both logits agree to 1e-6; with (0.5, 0.6) they are more than 0.01 apart.
# This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0

cat > "$work/check.py" <<'PY'
import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM

transformers.logging.set_verbosity_error()
SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16}


def gap(limit):
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**SIZES, n_groups=1, chunk_size=8, time_step_limit=limit)).eval()
    tokens = torch.randint(0, 32, (1, 12))
    with torch.no_grad():
        together = model(tokens).logits[:, -1]
        before = model(tokens[:, :-1], use_cache=True)
        last = model(tokens[:, -1:], cache_params=before.cache_params, use_cache=True).logits[:, -1]
    return float((together - last).abs().max())


free, bound = gap((0.0, float("inf"))), gap((0.5, 0.6))
print(f"transformers {transformers.__version__}: logits with and without the cache are {free:.1g} apart, bounded {bound:.2g}")
raise SystemExit(not (free < 1e-5 and bound > 0.01))
PY
"$work/venv/bin/python" "$work/check.py"
