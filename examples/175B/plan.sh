#!/usr/bin/env bash
# The plan of GPT-3 175B on 1,024 GPUs of 80 GB, on any machine: see README.md beside this file.
#   examples/175B/plan.sh [flags of train.py]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
"${PYTHON:-$root/.venv/bin/python}" "$root/deepy.py" train.py "$root/configs/175B.yml" \
  --global-num-gpus 1024 --gpu-memory 80 --dry-run "$@"
