#!/usr/bin/env bash
# The gated norm of Mamba2ForCausalLM with several groups (`n_groups`): transformers 4.57.6 takes the mean square over all
# features, 5.23.0 over those of each group. So one folder of weights with n_groups above 1 gives other logits, and no
# setting says which of the two a model was trained with.
# Seen: logits of a random model agree to 1e-5 with one group, and are more than 0.01 apart with two.
# This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for release in 4.57.6 5.23.0; do
  python3 -m venv "$work/$release"
  "$work/$release/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
  "$work/$release/bin/pip" install --quiet --disable-pip-version-check "transformers==$release"
done

cat > "$work/logits.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM

transformers.logging.set_verbosity_error()
work = Path(sys.argv[1])
sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16}
for groups in (1, 2):
    folder = work / f"model{groups}"
    if not folder.exists():
        torch.manual_seed(0)
        made = Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=groups, chunk_size=8, time_step_limit=(0.0, 100.0)))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(1.0 + 0.5 * torch.rand(parameter.shape))
        made.save_pretrained(folder)
    model = Mamba2ForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
    torch.save(logits, work / f"{transformers.__version__}-{groups}.pt")
PY
"$work/4.57.6/bin/python" "$work/logits.py" "$work" > /dev/null
"$work/5.23.0/bin/python" "$work/logits.py" "$work" > /dev/null
cat > "$work/compare.py" <<'PY'
import sys
from pathlib import Path

import torch

work = Path(sys.argv[1])
gaps = []
for groups in (1, 2):
    old, new = (torch.load(work / f"{release}-{groups}.pt") for release in ("4.57.6", "5.23.0"))
    gaps.append(float((old - new).abs().max()))
print(f"logits of 4.57.6 and 5.23.0 are {gaps[0]:.1g} apart with one group, and {gaps[1]:.2g} with two")
raise SystemExit(not (gaps[0] < 1e-5 and gaps[1] > 0.01))
PY
"$work/5.23.0/bin/python" "$work/compare.py" "$work"
