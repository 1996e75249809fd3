#!/usr/bin/env bash
# transformers 5.23.0: a config.json that holds `rope_parameters` (as release 5 writes it) and to which `rope_scaling` is
# added, as model cards tell users to do for long contexts, loses the base of its rotary positions: `rope_scaling` wins
# whole, and the base it does not name becomes the default of the class.
# Seen: without the addition rope_theta 1000000.0, with it 10000.0. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cat > "$work/check.py" <<'PY'
import json
import pathlib
import sys

from transformers import AutoConfig, Qwen3Config

folder = pathlib.Path(sys.argv[1])
Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}).save_pretrained(folder)
before = AutoConfig.from_pretrained(folder).rope_parameters
path = folder / "config.json"
settings = json.loads(path.read_text())
settings["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
path.write_text(json.dumps(settings))
after = AutoConfig.from_pretrained(folder).rope_parameters
print(before["rope_theta"], after["rope_type"], after["rope_theta"])
PY
found=$("$work/env/bin/python" "$work/check.py" "$work/model" 2>/dev/null)
echo "rope_theta as written, then type and rope_theta with rope_scaling beside it: $found"
[ "$found" = "1000000.0 yarn 10000.0" ]
