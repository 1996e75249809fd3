"""Low-rank updates and soft prompts against the package `peft`: the same training, and exports that it loads.

Models of transformers are the frozen part; ours reads their folder. What is trained here is exported and loaded by peft
on top of the same model, and what is merged is loaded by transformers. Some get rows for new tokens, which are trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.huggingface.peft_adapter import export_adapter
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.checkpoint.load.stored_model import open_model
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine, init_topology
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, tensors
from tests.checkpoint.huggingface.models import VOCABULARY, make, save, tokens
from tests.multi_rank import run_distributed

STEPS, RATE, CLIP, DECAY = 10, 5e-3, 0.5, 0.1
LENGTH = 24
UPDATES = {"lora": {"rank": 4, "alpha": 12, "targets": "all"}}
ROWS = {"lora": {"rank": 4, "alpha": 6, "rslora": True, "targets": ["dense", "dense_4h_to_h"]}}
NORMS = {"lora": {"rank": 4, "alpha": 6, "targets": "all", "dora": True}}
BOTH_NORMS = {"lora": {**NORMS["lora"], "rslora": True, "targets": ["dense", "dense_4h_to_h"]}}
WITHOUT_OUTPUTS = {"lora": {"rank": 4, "targets": ["query_key_value", "dense", "in_proj", "dense_4h_to_h"]}}
INPUTS = {"lora": {"rank": 4, "alpha": 12, "targets": ["in_proj"]}}
EXPERTS = {"lora": {"rank": 4, "alpha": 12, "targets": ["dense", "experts"]}, "moe_aux_loss_coeff": 0.0}
DENSE = ["dense", "dense_h_to_4h", "dense_4h_to_h"]
SHARED = {"lora": {"rank": 4, "alpha": 12, "targets": ["dense", "shared_experts"]}, "moe_aux_loss_coeff": 0.0}
SHARED_AND_DENSE = {"lora": {**SHARED["lora"], "targets": [*DENSE, "shared_experts"]}, "moe_aux_loss_coeff": 0.0}
SHARED_OUTPUTS = {"lora": {**SHARED["lora"], "targets": ["dense", "shared_4h_to_h"]}, "moe_aux_loss_coeff": 0.0}
DENSE_OUTPUTS = {
    "lora": {**SHARED["lora"], "targets": ["dense", "dense_4h_to_h", "shared_4h_to_h"]},
    "moe_aux_loss_coeff": 0.0,
}
SHARED_NORMS = {"lora": {**SHARED["lora"], "dora": True}, "moe_aux_loss_coeff": 0.0}
OUTPUTS = {"lora": {**EXPERTS["lora"], "targets": ["experts_4h_to_h"], "rslora": True}, "moe_aux_loss_coeff": 0.0}
BOTH = {"lora": {**UPDATES["lora"], "modules_to_save": ["embedding", "head"]}}
NEW, PADDING = 2, 6
PROMPT = {"soft_prompt_tuning": {"num_tokens": 5, "init_range": 0.2}}
Found = tuple[list[float], list[float], Tensor]


def batch(vocabulary: int = VOCABULARY) -> Tensor:
    """Token ids [4, LENGTH + 1]."""
    return torch.randint(0, vocabulary, (4, LENGTH + 1), generator=torch.Generator().manual_seed(8))


@dataclass(frozen=True)
class Case:
    """A model of transformers, what is trained beside it, and the folder of both."""

    name: str
    added: dict[str, Any]
    folder: Path

    @property
    def new(self) -> int:
        """Tokens that the model has no rows for: some where their rows are trained."""
        return NEW if self.added.get("lora", {}).get("modules_to_save") else 0

    @property
    def padded(self) -> int:
        """Rows of our embedding."""
        return VOCABULARY + self.new + PADDING if self.new else VOCABULARY

    def inputs(self) -> Tensor:
        """Token ids [3, 24], new ones among them."""
        ids = tokens()
        return ids.where(ids >= 2 * self.new, ids % 2 + VOCABULARY) if self.new else ids

    def base(self) -> PreTrainedModel:
        """The model of transformers, with rows for the new tokens, or with matrices of 4 bits by bitsandbytes."""
        kind = self.added.get("lora", {}).get("base")
        if kind is not None:
            few = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
            loaded = AutoModelForCausalLM.from_pretrained(self.folder / "theirs", quantization_config=few).eval()
            for module in loaded.modules():
                if isinstance(module, bitsandbytes.nn.Linear4bit):  # with AVX-512 it would multiply in bfloat16
                    module.support_avx512bf16_for_cpu = False
            return loaded
        model = make(self.name)
        if self.new:
            model.resize_token_embeddings(VOCABULARY + self.new, mean_resizing=False)
        return model

    @property
    def prompt(self) -> int:
        """Vectors of the prompt."""
        return int(self.added.get("soft_prompt_tuning", {}).get("num_tokens", 0))

    def config(self, world_size: int, **layout: int) -> Config:
        """Training on one batch, from the folder of transformers."""
        keys = {
            **Folder.open(self.folder / "theirs").settings(),
            "vocab_size": VOCABULARY + self.new,
            "make_vocab_size_divisible_by": 1,
            "seq_length": LENGTH + self.prompt,
            "load": str(self.folder / "theirs"),
            "finetune": True,
            "save": str(self.folder / "ours"),
            "checkpoint_factor": 1,
            "train_batch_size": 4,
            "train_iters": STEPS,
            "gradient_clipping": CLIP,
            "weight_decay": DECAY,
            **self.added,
            **layout,
            "optimizer": {"type": "Adam", "params": {"lr": RATE, "eps": 1e-8}},
        }
        return resolve([], keys, Resources(world_size)).config


def trained(rank: int, world_size: int, cases: list[Case], layout: dict[str, int]) -> list[Found]:
    """For each case losses and gradient norms of STEPS steps, and the model's logits afterwards.

    Checkpoints of the start and of the end are saved.
    """
    topology: Topology | None = None
    found = []
    for case in cases:
        config = case.config(world_size, **layout)
        topology = topology or init_topology(config)
        checkpoint = find_checkpoint(
            config, tensors(ModelDims.of(config.model, config.moe, config.mixers), case.padded)
        )
        sizes = {"padded_vocab_size": case.padded, "vocab_size": VOCABULARY + case.new}
        engine = build_training_engine(config, topology, **sizes, checkpoint=checkpoint)
        saver = Saver(config, engine, padded_vocab_size=case.padded)
        saver.save(Counters(0))
        rows = batch(VOCABULARY + case.new)
        one = MicroBatch(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(4, LENGTH)).behind(case.prompt)
        steps = [engine.train_step(iter([one]), RATE) for _ in range(STEPS)]
        logits = engine.logits(case.inputs())[..., : VOCABULARY + case.new]
        saver.save(Counters(STEPS))
        found.append(([float(step.loss) for step in steps], [float(step.grad_norm) for step in steps], logits))
    return found


def train(cases: list[Case], ranks: int, **layout: int) -> dict[str, tuple[Case, Found]]:
    """All cases, by their names and what is trained."""
    for case in cases:
        save(case.name, case.folder / "theirs")
    found = run_distributed(trained, ranks, cases, layout, timeout=400)[0]
    return {case.folder.name: (case, one) for case, one in zip(cases, found, strict=True)}


def with_adapter(case: Case, iteration: int) -> PeftModel:
    """What was exported of an iteration, on top of the model, by peft; without dropout."""
    position = case.folder / f"adapter{iteration}"
    export_adapter(open_model(case.folder / "ours", iteration=iteration), position)
    return PeftModel.from_pretrained(case.base(), position).eval()


def theirs(case: Case) -> tuple[list[float], list[float]]:
    """The same steps by peft and torch, from what our run started with."""
    model = with_adapter(case, 0)
    changed = ("lora_", "prompt_encoder", "modules_to_save")
    parameters = [one for name, one in model.named_parameters() if any(part in name for part in changed)]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in parameters if one.dim() > 1]},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    for parameter in parameters:
        parameter.requires_grad_()
    rows = batch(VOCABULARY + case.new)
    losses, norms = [], []
    for _ in range(STEPS):
        logits = model(input_ids=rows[:, :-1]).logits[:, case.prompt :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms


ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "neox, updates": ("neox", UPDATES),
    "gpt2, updates": ("gpt2", UPDATES),
    "llama, updates": ("llama, grouped, biases", ROWS),
    "neox, norms": ("neox", NORMS),
    "gpt2, norms": ("gpt2", NORMS),
    "llama, norms": ("llama, grouped, biases", BOTH_NORMS),
    "qwen3_moe, experts": ("qwen3_moe", EXPERTS),
    "qwen2_moe, outputs of shared experts": ("qwen2_moe", SHARED_OUTPUTS),
    "deepseek_v3, outputs of shared experts and of a dense block": ("deepseek_v3", DENSE_OUTPUTS),
    "gpt_oss, experts": ("gpt_oss", EXPERTS),
    "mixtral, outputs of experts": ("mixtral", OUTPUTS),
    "mamba, updates": ("mamba", INPUTS),
    "mamba2, norms": ("mamba2", {"lora": {**INPUTS["lora"], "dora": True}}),
    "neox, updates and both": ("neox", BOTH),
    "gpt2, updates and the one matrix of both": ("gpt2", BOTH),
    "llama, updates, nf4": ("llama, grouped, biases", {"lora": {**ROWS["lora"], "base": "nf4"}}),
    "llama, updates, fp4": ("llama, grouped, biases", {"lora": {**ROWS["lora"], "base": "fp4"}}),
    "neox, prompt": ("neox", PROMPT),
    "gpt2, prompt": ("gpt2", PROMPT),
}
EXPORTS = ["neox, one residual, tied", "llama, as many kv heads", "llama, grouped, biases", "mistral", "qwen3"]
EXPORTS += ["mpt", "gpt2", "opt", "qwen2", "gemma3", "cohere2", "nemotron_h, dense, biases", "mamba", "mamba2"]
MIXTURES = ["nemotron_h", "gpt_oss"]
SHARING = ["qwen2_moe", "glm4_moe"]
SAVED = [*EXPORTS[:-3], "neox", "llama, wide heads, tied", "gpt2, untied, exact gelu", "opt, untied, no biases"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Found]]:
    folder = tmp_path_factory.mktemp("alone")
    attention = {"lora": {"rank": 4, "targets": ["query_key_value", "dense"]}}
    cases = {**ALONE, **{name: (name, attention) for name in ("mixtral", "qwen3_next")}}
    cases |= {"mamba2, merged": ("mamba2", UPDATES), "glm4_moe, merged": ("glm4_moe", SHARED_NORMS)}
    return train([Case(name, added, folder / reported) for reported, (name, added) in cases.items()], 1)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Found]]:
    """Trained on two tensor-parallel ranks, every other one with norms of rows."""
    folder = tmp_path_factory.mktemp("cut")
    added = [NORMS if number % 2 else UPDATES for number in range(len(EXPORTS))]
    given = {"mamba": INPUTS, "mamba2": INPUTS, "nemotron_h, dense, biases": WITHOUT_OUTPUTS}
    cases = [Case(name, given.get(name, one), folder / name) for name, one in zip(EXPORTS, added, strict=True)]
    cases += [Case(name, EXPERTS, folder / name) for name in MIXTURES]
    cases += [Case(name, one, folder / name) for name, one in zip(SHARING, (SHARED, SHARED_AND_DENSE), strict=True)]
    return train(cases, 2, model_parallel_size=2)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Found]]:
    """Trained on two tensor-parallel ranks, together with the rows of all tokens, two new ones among them."""
    folder = tmp_path_factory.mktemp("grown")
    return train([Case(name, BOTH, folder / name) for name in SAVED], 2, model_parallel_size=2)


@pytest.mark.parametrize("reported", ALONE)
def test_training_is_that_of_peft(reported: str, alone: dict[str, tuple[Case, Found]]) -> None:
    """Ten steps of Adam with clipping and weight decay from the same start; the end says the same to 1e-5."""
    case, (losses, norms, logits) = alone[reported]
    expected, expected_norms = theirs(case)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert expected[-1] < expected[0] - 0.01, "it learns, else the comparison proves little"
    assert max(expected_norms) > CLIP or case.prompt, "clipping is active"
    with torch.no_grad():
        said = with_adapter(case, STEPS)(input_ids=case.inputs()).logits[:, case.prompt :]
    torch.testing.assert_close(logits, said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*EXPORTS, *MIXTURES, *SHARING])
def test_updates_of_every_family_are_loaded(name: str, cut: dict[str, tuple[Case, Found]]) -> None:
    """As a folder of peft on top of the model, and merged into it."""
    case, (_, _, logits) = cut[name]
    export(open_model(case.folder / "ours"), case.folder / "whole")
    with torch.no_grad():
        before = make(name)(input_ids=tokens()).logits
        full = AutoModelForCausalLM.from_pretrained(case.folder / "whole").eval()(tokens()).logits
        said = with_adapter(case, STEPS)(input_ids=tokens()).logits
    torch.testing.assert_close(said, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full, logits, rtol=1e-5, atol=1e-5)
    assert (before - logits).abs().max() > 0.05, "the updates matter"


@pytest.mark.parametrize("name", SAVED)
def test_trained_rows_of_every_family_are_loaded(name: str, grown: dict[str, tuple[Case, Found]]) -> None:
    """As peft keeps modules_to_save: without padding, and one matrix that is both under the names of both."""
    case, (_, _, logits) = grown[name]
    rows = VOCABULARY + NEW
    position = case.folder / f"adapter{STEPS}"
    with torch.no_grad():
        said = with_adapter(case, STEPS)(input_ids=case.inputs()).logits
    torch.testing.assert_close(said, logits, rtol=1e-5, atol=1e-5)
    export(open_model(case.folder / "ours"), case.folder / "whole", tokens=rows)
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(case.folder / "whole").eval()(case.inputs()).logits
    torch.testing.assert_close(said, full, rtol=1e-5, atol=1e-5)
    held = load_file(position / "adapter_model.safetensors")
    matrices = {key: value for key, value in held.items() if ".lora_" not in key}
    base = case.base()
    expected = {
        theirs for theirs, module in base.named_modules() if module in (base.get_input_embeddings(), head(base))
    }
    assert expected <= {key.removeprefix("base_model.model.").removesuffix(".weight") for key in matrices}
    settings = json.loads((position / "adapter_config.json").read_text())
    assert {key.split(".")[-2] for key in matrices} == set(settings["modules_to_save"])
    assert all(value.shape == (rows, 64) for value in matrices.values())
    embedding = next(value for key, value in matrices.items() if "head" not in key and "embed_out" not in key)
    assert not torch.equal(embedding[-1], embedding[-2]), "the new rows were trained apart"


def head(model: PreTrainedModel) -> torch.nn.Module:
    """Its output layer."""
    found: torch.nn.Module = model.get_output_embeddings()
    return found


def test_mixtral_takes_updates_of_its_attention(alone: dict[str, tuple[Case, Found]]) -> None:
    case, (_, _, logits) = alone["mixtral"]
    with torch.no_grad():
        said = with_adapter(case, STEPS)(input_ids=tokens()).logits
    torch.testing.assert_close(said, logits, rtol=1e-5, atol=1e-5)


MERGED_ALONE = {
    "mamba2, merged": "peft loads no update of out_proj in a model of the family mamba2",
    # peft reaches these matrices by their parameter, for which it has no norms of rows
    "glm4_moe, merged": r"peft has no norms of rows \(dora\) for mlp\.shared_experts\.down_proj",
    # queries and output gates are one matrix there, so that an update of ours is none of peft's
    "qwen3_next": "qwen3_next keeps query_key_value and another matrix of ours as one",
}


@pytest.mark.parametrize("name", MERGED_ALONE)
def test_updates_that_peft_cannot_take_are_merged(
    name: str, alone: dict[str, tuple[Case, Found]], tmp_path: Path
) -> None:
    case, (_, _, logits) = alone[name]
    stored = open_model(case.folder / "ours")
    with pytest.raises(ConfigError, match=MERGED_ALONE[name]):
        export_adapter(stored, tmp_path / "adapter")
    export(stored, tmp_path / "whole")
    with torch.no_grad():
        said = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()(tokens()).logits
        before = make(case.name)(tokens()).logits
    torch.testing.assert_close(logits, said, rtol=1e-5, atol=1e-5)
    assert (before - logits).abs().max() > 0.05, "the updates matter"


def test_what_cannot_be_exported_is_reported(alone: dict[str, tuple[Case, Found]], tmp_path: Path) -> None:
    stored = open_model(alone["neox, prompt"][0].folder / "ours")
    with pytest.raises(ConfigError, match=r"no part of any matrix, so it cannot be merged.*--adapter-only"):
        export(stored, tmp_path / "whole")
    with pytest.raises(ConfigError, match="norm = 'layernorm': a LLaMA model has 'rmsnorm'"):
        export_adapter(stored, tmp_path / "llama", family_name="llama")
    assert not list(tmp_path.iterdir())
