"""Laws of who may name what: the whole Config, DeepSpeed, and packages that only one feature needs."""

from __future__ import annotations

import ast
import re
import sys

from megatron.config.validation.unsupported import FAMILIES
from tests.architecture.source import PRODUCT, ROOT, Source, imports, sample

KNOW_CONFIG = (
    "megatron/config/",
    "megatron/plan/",
    "megatron/launcher/",
    "megatron/checkpoint/save/saver.py",
    "megatron/checkpoint/load/loader.py",
    "megatron/checkpoint/load/vocabulary.py",
    "megatron/checkpoint/offline/reshard.py",
    "megatron/checkpoint/huggingface/",
    "megatron/engine/builder.py",
    "megatron/engine/loss_setup.py",
    "megatron/engine/vocabulary.py",
    "megatron/training/trainer.py",
    "megatron/training/data_setup.py",
    "megatron/training/retro_setup.py",
    "megatron/training/task_setup.py",
    "megatron/training/mup/coord_check.py",
    "megatron/inference/runner.py",
    "megatron/evaluation/runner.py",
    "megatron/retrieval/retriever.py",
    "megatron/retrieval/runner.py",
    "megatron/serving/server.py",
)

# Every package that is imported and where. A trailing slash means a folder; "" means anywhere outside the light rooms,
# which test_floors.py watches.
WHERE: dict[str, tuple[str, ...]] = {
    "torch": ("",),
    "numpy": ("",),
    "pydantic": ("megatron/config/", "megatron/serving/"),
    "pydantic_core": ("megatron/config/",),
    "yaml": ("megatron/config/", "megatron/evaluation/", "tools/", "benchmarks/"),
    "rich": ("megatron/metrics/", "tools/"),
    "tokenizers": ("megatron/tokenizers/", "tools/"),
    "deepspeed": (
        "megatron/distributed/mesh.py",
        "megatron/distributed/init.py",
        "megatron/distributed/rng_tracker.py",
        "megatron/model/pipeline_model.py",
        "megatron/model/moe/",
        "megatron/engine/",
        "megatron/optim/",
        "benchmarks/",
    ),
    "bitsandbytes": ("megatron/optim/bitsandbytes.py", "megatron/kernels/four_bits.py"),
    "pytorch_optimizer": ("megatron/optim/",),
    "wandb": ("megatron/metrics/sinks/wandb.py",),
    "comet_ml": ("megatron/metrics/sinks/comet.py",),
    "lm_eval": ("megatron/evaluation/", "benchmarks/"),
    "tensorboard": ("megatron/metrics/sinks/tensorboard.py",),
    "apex": ("megatron/kernels/apex.py", "megatron/optim/apex_adam.py"),
    "flash_attn": ("megatron/kernels/flash_attention.py",),
    "flash_attn_interface": ("megatron/kernels/flash_attention.py",),
    "transformer_engine": ("megatron/model/norms/transformer_engine.py", "megatron/kernels/transformer_engine.py"),
    "matplotlib": ("tools/plot_metrics.py", "megatron/training/mup/plot.py"),
    "numba": ("megatron/data/dataset/numba_loops.py",),
    "torchtitan": ("benchmarks/llama_contenders.py",),
    "transformers": ("benchmarks/", "megatron/retrieval/text_embedder.py"),
    "fastapi": ("megatron/serving/",),
    "starlette": ("megatron/serving/",),
    "uvicorn": ("megatron/serving/",),
    "litgpt": ("benchmarks/",),
    "boto3": ("megatron/checkpoint/remote/s3_client.py",),
    "botocore": ("megatron/checkpoint/remote/s3_client.py",),
    "causal_conv1d": ("megatron/kernels/mamba.py",),
    "fla": ("megatron/kernels/flash_linear_attention.py",),
    "mamba_ssm": ("megatron/kernels/mamba.py",),
    "triton": ("megatron/kernels/triton/", "benchmarks/kernel_resources.py"),
    "faiss": ("megatron/retrieval/faiss_index.py",),
    "ftfy": ("megatron/data/",),
    "zstandard": ("megatron/data/",),
    "tiktoken": ("megatron/tokenizers/", "benchmarks/"),
    "sentencepiece": ("megatron/tokenizers/",),
    "huggingface_hub": ("megatron/tokenizers/pretrained.py",),
    "jinja2": ("megatron/tokenizers/chat_template.py",),
    "setuptools": ("setup.py",),
}
OWN = frozenset({"megatron", "tools", "benchmarks", "__future__"})

# Where a name that a YAML gives to a part may be compared: in the room of the parts. config, plan and shapes do without
# torch, so they cannot ask the part itself. Everywhere else the registry has already turned the name into the part.
CHOICES = {
    "activation": "megatron/model/",
    "attention_config": "megatron/model/",
    "init_method": "megatron/model/",
    "lr_decay_style": "megatron/optim/",
    "norm": "megatron/model/",
    "optimizer_type": "megatron/optim/",
    "output_layer_init_method": "megatron/model/",
    "pos_emb": "megatron/model/",
    "tokenizer_type": "megatron/tokenizers/",
    "train_impl": "megatron/objectives/",
}
WITHOUT_TORCH = ("megatron/config/", "megatron/plan/", "megatron/param_table/")


def choice_complaints(source: Source) -> list[str]:
    """Comparisons of a part's name with a string, outside the room of the part."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Compare) or source.within(*WITHOUT_TORCH):
            continue
        sides = [node.left, *node.comparators]
        keys = {side.attr if isinstance(side, ast.Attribute) else getattr(side, "id", "") for side in sides}
        strings = [part for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)]
        if any(isinstance(part.value, str) for part in strings):
            found += [
                source.complaint(node, f"{key} is decided by the registry, and compared only in {CHOICES[key]}")
                for key in sorted(keys & CHOICES.keys())
                if not source.within(CHOICES[key])
            ]
    return found


def config_complaints(source: Source) -> list[str]:
    """Files that name the whole Config though one section, or plain values, would do."""
    if source.is_entry_point or source.within(*KNOW_CONFIG):
        return []
    found = []
    for node in ast.walk(source.tree):
        named = (
            (isinstance(node, ast.Name) and node.id == "Config")
            or (isinstance(node, ast.Attribute) and node.attr == "Config")
            or (isinstance(node, ast.alias) and node.name.split(".")[-1] == "Config")
            or (isinstance(node, ast.Constant) and node.value == "Config")
        )
        if named:
            found.append(source.complaint(node, "names the whole Config; take a section or plain values"))
    return found


def package_complaints(source: Source) -> list[str]:
    """Packages imported outside the files that are about them."""
    found = []
    for item in imports(source):
        if item.top in sys.stdlib_module_names or item.top in OWN:
            continue
        positions = WHERE.get(item.top)
        if item.module == "torch.utils.tensorboard":
            positions = WHERE["tensorboard"]
        if positions is None:
            found.append(source.complaint(item.node, f"{item.top} is in no list of where packages are used"))
        elif "" not in positions and not source.within(*positions):
            found.append(source.complaint(item.node, f"{item.module} belongs in {', '.join(positions)}"))
    return found


def test_few_know_the_full_config() -> None:
    assert [complaint for source in PRODUCT for complaint in config_complaints(source)] == []


def test_the_map_lists_who_knows_the_full_config() -> None:
    page = (ROOT / "megatron" / "README.md").read_text(encoding="utf-8")
    sentence = page.partition("`Config` is named only by")[2].partition(". Everything else")[0]
    assert {f"megatron/{path}" for path in re.findall(r"`([\w./]+)`", sentence)} == set(KNOW_CONFIG)


def test_config_law_can_complain() -> None:
    assert config_complaints(sample("megatron/data/dataset/builder.py", "from megatron.config import Config\n"))
    assert config_complaints(
        sample("megatron/data/dataset/builder.py", "import megatron.config as c\ndef f(x: c.Config): ...\n")
    )
    assert config_complaints(sample("megatron/data/dataset/builder.py", 'def f(x: "Config"): ...\n'))
    assert config_complaints(sample("megatron/engine/builder.py", "from megatron.config import Config\n")) == []
    assert config_complaints(sample("train.py", "from megatron.config import Config\n")) == []


def test_packages_stay_where_they_belong() -> None:
    assert [complaint for source in PRODUCT for complaint in package_complaints(source)] == []


def test_package_law_can_complain() -> None:
    assert package_complaints(sample("megatron/training/loop.py", "def f():\n    import deepspeed\n"))
    assert package_complaints(
        sample("megatron/metrics/reporter.py", "from torch.utils.tensorboard import SummaryWriter\n")
    )
    assert package_complaints(sample("megatron/data/dataset/gpt_dataset.py", "import polars\n"))
    assert package_complaints(sample("megatron/engine/deepspeed_engine.py", "import deepspeed, torch\n")) == []


def test_a_choice_is_decided_once() -> None:
    assert [complaint for source in PRODUCT for complaint in choice_complaints(source)] == []


def test_choice_law_can_complain() -> None:
    assert choice_complaints(sample("megatron/engine/builder.py", "if model.norm == 'rmsnorm': x\n"))
    assert choice_complaints(
        sample("megatron/engine/builder.py", "def f(pos_emb): return pos_emb in ('rotary', 'rpe')\n")
    )
    assert choice_complaints(sample("megatron/model/layers.py", "if model.norm == 'rmsnorm': x\n")) == []
    assert choice_complaints(sample("megatron/engine/builder.py", "if norm > limit: x\n")) == []


def test_every_family_of_parts_has_an_owner() -> None:
    assert CHOICES.keys() == FAMILIES.keys()
