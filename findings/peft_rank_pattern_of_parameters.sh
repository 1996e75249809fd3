#!/usr/bin/env bash
# peft 0.21.2: `rank_pattern` for an entry of `target_parameters` takes effect, and a warning says that it was ignored.
# Of two parameters of one module the adapter of the first one is below the other's: `lora_A` of the module belongs to
# the second parameter, and `base_layer.lora_A` to the first, by the order in which the module registers them.
# Seen: with rank 2 and rank_pattern {"experts.up": 5} of 3 experts the two lora_A have 15 and 6 rows, and the warning
# names `experts.up`. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0

cat > "$work/check.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 4, 6))
        self.down = torch.nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return sum(torch.relu(x @ up) @ down for up, down in zip(self.up, self.down))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    both = ["experts.down", "experts.up"]
    settings = LoraConfig(r=2, target_modules=[], target_parameters=both, rank_pattern={"experts.up": 5})
    model = get_peft_model(Model(), settings)
rows = {name: len(each) for name, each in model.named_parameters() if "lora_A" in name}
said = any("rank_pattern" in str(one.message) and "ignored: ['experts.up']" in str(one.message) for one in seen)
print(rows, said)
PY
found=$("$work/env/bin/python" "$work/check.py" 2>/dev/null | tail -1)
echo "$found"
[ "$found" = "{'base_model.model.experts.base_layer.lora_A.default.weight': 15, 'base_model.model.experts.lora_A.default.weight': 6} True" ]
