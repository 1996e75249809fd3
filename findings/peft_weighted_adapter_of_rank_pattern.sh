#!/usr/bin/env bash
# peft 0.21.2: `add_weighted_adapter(..., combination_type="linear")` of adapters that have a `rank_pattern` makes one
# whose configuration has none. In memory it is right; the folder that save_pretrained writes of it says one rank for
# all modules, and from_pretrained refuses it for the shapes of those that have another.
# Seen: with r 8 and rank_pattern {"up": 3} the new adapter's pattern is {} and its lora_A of `up` has 3 rows; the load
# raises a RuntimeError about sizes. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0

cat > "$work/check.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


settings = dict(r=8, target_modules=["up", "down"], rank_pattern={"up": 3})
combined = get_peft_model(Model(), LoraConfig(**settings), adapter_name="first")
combined.add_adapter("second", LoraConfig(**settings))
combined.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="linear")
pattern = combined.peft_config["both"].rank_pattern
rows = {name: len(each) for name, each in combined.named_parameters() if name.endswith("lora_A.both.weight")}
combined.save_pretrained(sys.argv[1], selected_adapters=["both"])
try:
    PeftModel.from_pretrained(Model(), f"{sys.argv[1]}/both")
    outcome = "loaded"
except RuntimeError as error:
    outcome = "size mismatch" if "size mismatch" in str(error) else "another error"
print(pattern, list(rows.values()), outcome)
PY
found=$("$work/env/bin/python" "$work/check.py" "$work/saved" 2>/dev/null | tail -1)
echo "$found"
[ "$found" = "{} [3, 8] size mismatch" ]
