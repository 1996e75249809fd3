"""Modules of DeepSeek-V3 that predict further tokens: imported, trained, given away.

The reference is transformers' class of such modules (`MtpModel`) in float64, in a loop over texts and positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.stored_model import open_model
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.param_table import ModelDims
from tests.checkpoint.huggingface.family_runs import (
    DECAY,
    EPSILON,
    LENGTH,
    RATE,
    STEPS,
    Found,
    rows,
    settings_of,
    trained,
)
from tests.checkpoint.huggingface.models import VOCABULARY, make
from tests.layouts import pick
from tests.multi_rank import run_distributed
from tools import convert_from_hf

DEPTHS, FACTOR = 2, 0.3
LAYOUTS = pick("one process", "tensor 2, sequence, ZeRO 1", "data 2, experts 2, ZeRO 2", "pipeline 2, accumulation 2")
RENAMED = {"mtp_block.": "", "post_norm.": "shared_head.norm."}


def theirs() -> tuple[Any, Any]:
    """A DeepSeek-V3 and two modules behind it, whose weights are drawn at random."""
    model = make("deepseek_v3")
    model.config.num_mtp_layers = DEPTHS
    modules = MtpModel(model, DEPTHS)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # the class leaves its experts as it finds the memory
        for parameter in modules.layers.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(drawn + 1 if parameter.dim() == 1 else drawn)
    return model, modules


def write(folder: Path) -> dict[str, Any]:
    """Writes both as public folders have them; returns our keys."""
    _, settings = settings_of("deepseek_v3", folder)
    stored = load_file(folder / "model.safetensors")
    _, modules = theirs()
    for depth, module in enumerate(modules.layers):
        start = f"model.layers.{settings['num_layers'] + depth}."
        for name, tensor in module.state_dict().items():
            for old, new in RENAMED.items():
                name = name.removeprefix(old) if new == "" else name.replace(old, new)
            stored |= _apart(start + name, tensor)
        stored |= {start + "embed_tokens.weight": stored["model.embed_tokens.weight"].clone()}
        stored |= {start + "shared_head.head.weight": stored["lm_head.weight"].clone()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return settings


def _apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the class, as files have it: one tensor an expert."""
    start, _, kind = name.rpartition("mlp.experts.")
    if kind == "gate_up_proj":
        halves = [each.chunk(2) for each in tensor]
        names = (f"{start}mlp.experts.{{}}.gate_proj.weight", f"{start}mlp.experts.{{}}.up_proj.weight")
        return {names[half].format(n): pair[half] for n, pair in enumerate(halves) for half in (0, 1)}
    if kind == "down_proj":
        return {f"{start}mlp.experts.{n}.down_proj.weight": each for n, each in enumerate(tensor)}
    return {name: tensor}


def loss_of(model: Any, modules: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the next token, and lambda / D times those of further ones: a loop over texts, depths and positions."""
    inputs, count = text[:, :-1], text[:, 1:].numel()
    main, further = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in range(len(text)):
        hidden = model.model(inputs[row : row + 1]).last_hidden_state
        logits = model.lm_head(hidden)[0].log_softmax(-1)
        for at in range(LENGTH):
            main = main - logits[at, text[row, at + 1]]
        for depth, module in enumerate(modules.layers, start=1):
            length = LENGTH - depth  # positions whose further token is in the text
            hidden = hidden[:, : length + 1]  # one more, which no position sees
            positions = torch.arange(length + 1)[None] + depth
            mask = torch.full((length + 1, length + 1), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            hidden = module(
                model.model.embed_tokens(text[row : row + 1, depth : depth + length + 1]),
                hidden,
                position_embeddings=model.model.rotary_emb(hidden, positions),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=None,
            )
            logits = model.lm_head(hidden)[0].log_softmax(-1)
            for at in range(length):
                further = further - logits[at, text[row, at + depth + 1]]
    return main / count, FACTOR / DEPTHS * further / count


def steps() -> Found:
    model, modules = theirs()
    for part in (model, modules):
        part.double()
        part.config._attn_implementation = part.config._experts_implementation = "eager"
    held = dict.fromkeys([*model.parameters(), *modules.layers.parameters()])
    groups = [
        {"params": [one for one in held if one.dim() > 1], "weight_decay": DECAY},
        {"params": [one for one in held if one.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPSILON)
    losses, norms = [], []
    for _ in range(STEPS):
        main, further = loss_of(model, modules, rows())
        (main + further).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(held), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(main.detach()))
    with torch.no_grad():
        return losses, norms, model(rows()[:, :-1]).logits.float()


@pytest.fixture(scope="module")
def expected() -> Found:
    return steps()


MODULES = {"mtp_num_layers": DEPTHS, "mtp_loss_scaling_factor": FACTOR}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_those_of_a_loop_in_float64(layout: str, expected: Found, tmp_path: Path) -> None:
    settings = write(tmp_path)
    ranks, keys = LAYOUTS[layout]
    cases = {"further": (tmp_path, {**settings, **MODULES})}
    losses, norms, logits = run_distributed(trained, ranks, cases, keys, timeout=300)[0]["further"]
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert norms == pytest.approx(expected[1], rel=1e-4)
    torch.testing.assert_close(logits, expected[2], rtol=1e-4, atol=1e-4)


def dims(settings: dict[str, Any]) -> ModelDims:
    config = resolve([], {**settings, "seq_length": LENGTH, "user_script": "generate.py"}, Resources(1)).config
    return ModelDims.of(config.model, config.moe)


def test_modules_are_read_where_the_key_asks(tmp_path: Path) -> None:
    settings = write(tmp_path)
    folder = Folder.open(tmp_path)
    plain = set(folder.weights(dims(settings)).keys())
    requested = set(folder.weights(dims({**settings, **MODULES})).keys())
    last = settings["num_layers"] + 4
    assert plain == {key for key in requested if int(key.partition(".")[0]) <= last}
    assert {int(key.partition(".")[0]) for key in requested - plain} == {last + 1, last + 2}


def saved_and_read(rank: int, world_size: int, source: str, folder: str, settings: dict[str, Any]) -> list[Tensor]:
    """Saves a model with modules, and reads it without them."""
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, backend="gloo")
    keys = {**settings, **MODULES, "seq_length": LENGTH, "train_batch_size": 4, "train_iters": 1, "save": folder}
    keys |= {"checkpoint_factor": 1}
    config = resolve([], {**keys, "distributed_backend": "gloo"}, Resources(1)).config
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    Saver(config, engine, padded_vocab_size=VOCABULARY).save(Counters(0, 0))
    reader = build_inference_engine(config.replace(load=folder).for_inference(), topology, VOCABULARY)
    return [each.logits(rows()[:, :-1]).clone() for each in (engine, reader)]


def test_generation_leaves_modules_out_and_export_keeps_them(tmp_path: Path) -> None:
    """A checkpoint with modules is read without; as a folder it has them, and comes back with the same bits."""
    settings = write(tmp_path / "theirs")
    mine = tmp_path / "mine"
    engine, reader = run_distributed(saved_and_read, 1, str(tmp_path / "theirs"), str(mine), settings, timeout=300)[0]
    torch.testing.assert_close(reader, engine, rtol=1e-5, atol=1e-5)
    export(open_model(mine), tmp_path / "out")
    again = Folder.open(tmp_path / "out")
    assert again.config["num_nextn_predict_layers"] == DEPTHS
    stored = open_model(mine).weights
    weights = again.weights(dims({**settings, **MODULES}))
    again_keys = weights.keys()
    assert again_keys == stored.keys()
    for key in sorted(key for key in again_keys if int(key.partition(".")[0]) > settings["num_layers"] + 4):
        assert torch.equal(weights.shards(key)[0], stored.shards(key)[0]), key


def test_the_tool_reads_modules_where_the_flag_asks(tmp_path: Path) -> None:
    settings = write(tmp_path / "theirs")
    flags = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]
    assert convert_from_hf.main([*flags, "--mtp-num-layers", str(DEPTHS)]) == 0
    assert yaml.safe_load((tmp_path / "ours" / "model.yml").read_text())["mtp_num_layers"] == DEPTHS
    stored = open_model(tmp_path / "ours" / "global_step0").weights
    weights = Folder.open(tmp_path / "theirs").weights(dims({**settings, **MODULES}))
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored.shards(key)[0], weights.shards(key)[0]) for key in sorted(weights.keys()))
