#!/usr/bin/env bash
# peft 0.21.2: an entry of `modules_to_save` that the model has no module for is left out without an error or a warning.
# So an adapter that was made where the output layer had another name, as GPT-NeoX's `embed_out`, which is `lm_head` in
# transformers 5, loads on another release and keeps the base's output layer.
# Seen: with ["first", "absent"] only `first` is trainable, and no warning names `absent`. This script fails when that
# changes.
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


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    settings = LoraConfig(r=2, target_modules=["middle"], modules_to_save=["first", "absent"])
    model = get_peft_model(Model(), settings)
trained = sorted(name for name, each in model.named_parameters() if each.requires_grad and "lora" not in name)
print(trained, any("absent" in str(each.message) for each in seen))
PY
found=$("$work/env/bin/python" "$work/check.py" 2>/dev/null | tail -1)
echo "$found"
[ "$found" = "['base_model.model.first.modules_to_save.default.weight'] False" ]
