#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: in a model with experts of the Qwen2-MoE pattern (DeepSeek-V3 here), a target
# module whose name ends in gate_proj, up_proj or down_proj is taken for the matrices of routed experts, also where it
# names the MLP of the dense blocks or of the shared experts in full. Those get no update, and nothing is said.
# Seen: the routed experts' stacks are adapted, and no module of the dense block is;
# with target_parameters mlp.gate_proj.weight and so on the dense block is adapted. This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0

cat > "$work/check.py" <<'PY'
from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
PLACES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def adapted(**targets):
    model = get_peft_model(DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)), LoraConfig(r=2, **targets))
    names = [name for name, _ in model.named_parameters() if "lora_A" in name and ".mlp." in name]
    return {"experts" if ".experts." in name else "dense" for name in names}


by_module = adapted(target_modules=["self_attn.q_proj", *PLACES])
by_parameter = adapted(target_modules=["self_attn.q_proj"], target_parameters=[f"{name}.weight" for name in PLACES])
print(sorted(by_module), sorted(by_parameter))
PY
found=$("$work/env/bin/python" "$work/check.py" 2>/dev/null | tail -1)
echo "$found"
[ "$found" = "['experts'] ['dense']" ]
