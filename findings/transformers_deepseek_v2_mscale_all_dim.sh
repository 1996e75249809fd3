#!/usr/bin/env bash
# transformers 4.57.6: a DeepSeek-V2 model leaves `mscale_all_dim` of YaRN out of the factor of attention scores, without a
# word; its DeepSeek-V3 class has it. transformers 5.23.0 has it in both. The public V2 folders set it (0.707).
# Seen: attention scores are multiplied by head_dim^-0.5 times the square of 0.1 mscale_all_dim ln(factor) + 1 in 5.23.0 and
# in 4.57.6's DeepSeek-V3, and by head_dim^-0.5 alone in 4.57.6's DeepSeek-V2. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/check.py" <<'PY'
import math

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
FACTOR, ALL_DIM = 40.0, 0.707
yarn = {"rope_type": "yarn", "factor": FACTOR, "mscale": 0.707, "mscale_all_dim": ALL_DIM, "beta_fast": 32, "beta_slow": 1}
yarn |= {"original_max_position_embeddings": 16}
sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
latent = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32}
groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
old = transformers.__version__ == "4.57.6"
rope = {"rope_scaling": yarn, "rope_theta": 10000.0} if old else {"rope_parameters": {**yarn, "rope_theta": 10000.0}}
full = 24**-0.5 * (0.1 * ALL_DIM * math.log(FACTOR) + 1) ** 2
good = True
for name in ("deepseek_v2", "deepseek_v3"):
    config = AutoConfig.for_model(name, **sizes, **latent, **experts, **groups, **rope, max_position_embeddings=640)
    scale = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.scaling
    expected = 24**-0.5 if old and name == "deepseek_v2" else full
    print(f"transformers {transformers.__version__}, {name}: scores times {scale:.4f}, with mscale_all_dim {full:.4f}")
    good = good and abs(scale - expected) < 1e-6
raise SystemExit(not good)
PY
for version in 4.57.6 5.23.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  "$work/$version/bin/python" "$work/check.py"
done
