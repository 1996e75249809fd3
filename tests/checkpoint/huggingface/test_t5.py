"""T5 of transformers becomes ours and goes back without changing a bit, computes the same and generates the same text.

Logits and three steps of training within 1e-5 in fp32, greedy text token by token.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from megatron.checkpoint.huggingface.config_defaults import ALIASES
from megatron.checkpoint.huggingface.export_model import ExportOptions, export
from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_inference_engine, build_training_engine
from megatron.engine.encoder_decoder import EncoderDecoderEngine
from megatron.engine.inference_engine import InferenceEngine, build_stage
from megatron.errors import ConfigError
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, decode
from megatron.model.kv_cache import KVCache
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.value_residual import CarryShape
from megatron.param_table import ModelDims, tensors
from tests.model.sections import VOCABULARY
from tests.model.t5 import FORMS, SOURCE, TARGET, transformers_t5
from tests.model.test_encoder_decoder import batch
from tests.multi_rank import run_cases

LR, NEW, END = 1e-3, 12, 1
LENGTHS = {"encoder_seq_length": SOURCE, "decoder_seq_length": TARGET, "max_position_embeddings": SOURCE}
Answers = tuple[list[float], list[list[int]]]


def sources() -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(2, VOCABULARY, (size,), generator=generator).tolist() for size in (9, 3, 17, 9, 5)]


def greedy(config: Any, topology: Any) -> list[list[int]]:
    """What follows the sources, two at a time; a text that ends makes room for another one."""
    engine = build_inference_engine(config, topology, VOCABULARY)
    both = EncoderDecoderEngine.of(engine, 0, ModelDims.of(config.model))
    limits = Limits(frozenset({END}), NEW, 100)
    likeliest = partial(Sampler, Sampling(), vocab_size=VOCABULARY, seed=1, text_index=0)
    texts = [RunningSequence(source, limits, likeliest(prompt_tokens=len(source))) for source in sources()]
    for _ in decode(both, texts, rows=2):
        pass
    return [text.tokens[len(source) :] for text, source in zip(texts, sources(), strict=True)]


def answers(rank: int, world_size: int, load: Path, settings: dict[str, Any], layout: dict[str, Any]) -> Answers:
    """The losses of three steps of Adam, and greedy text of the model before them."""
    keys = {**settings, **LENGTHS, **layout, "load": str(load), "train_iters": 3, "finetune": True, "mask_prob": 0.1}
    keys |= {"train_batch_size": 3, "optimizer": {"type": "Adam", "params": {"lr": LR}}}
    keys |= {"weight_decay": 0.0, "gradient_clipping": 0.0, "distributed_backend": "gloo"}
    keys |= {"vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1}
    config = resolve([], keys, Resources(world_size)).config
    axes = config.parallelism
    topology = init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size, model_parallel_size=axes.model_parallel_size, seed=1, backend="gloo"
    )
    text = [] if axes.pipe_parallel_size > 1 else greedy(config, topology)
    checkpoint = find_checkpoint(config, tensors(ModelDims.of(config.model), VOCABULARY))
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
    given = batch()
    micro = MicroBatch(
        torch.cat((given["source"], given["target"]), dim=1),
        given["labels"] * given["mask"].long(),
        given["mask"],
        document_starts=given["starts"],
    )
    count = config.training.gradient_accumulation_steps or 1
    parts = {name: each.chunk(count) for name, each in vars(micro).items() if each is not None}
    batches = [MicroBatch(**{name: each[part] for name, each in parts.items()}) for part in range(count)]
    return [float(engine.train_step(iter(batches), LR).loss) for _ in range(3)], text


def expected(theirs: T5ForConditionalGeneration) -> Answers:
    theirs.eval()
    text = []
    for source in sources():  # without their cache, which has as many blocks as the encoder
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": END, "use_cache": False}
        made = theirs.generate(torch.tensor([source]), **settings)
        text.append(made[0, 1:].tolist())
    given = batch()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    labels = given["labels"].masked_fill(given["mask"] == 0, -100)
    losses = []
    for _ in range(3):
        loss = theirs(
            input_ids=given["source"], attention_mask=given["real"], decoder_input_ids=given["target"], labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, text


def written(form: str, folder: Path) -> T5ForConditionalGeneration:
    """A folder of transformers; releases of version 1.1 say tie_word_embeddings: false."""
    theirs = transformers_t5(form)
    theirs.save_pretrained(folder)
    if form == "t5 1.1":
        config = json.loads((folder / "config.json").read_text())
        del config["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return theirs


@pytest.mark.parametrize(("form", "model_size"), [("t5", 2), ("t5 1.1", 1)])
def test_there_and_back_changes_no_bit(form: str, model_size: int, tmp_path: Path) -> None:
    written(form, tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours", model_size=model_size)
    assert export(open_model(tmp_path / "ours"), tmp_path / "back").family == "t5"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    models = [T5ForConditionalGeneration.from_pretrained(tmp_path / name).eval() for name in ("theirs", "back")]
    given = batch()
    with torch.no_grad():
        one, other = (each(input_ids=given["source"], decoder_input_ids=given["target"]).logits for each in models)
    assert torch.equal(one, other)


def test_training_and_text_are_theirs_in_every_layout(tmp_path: Path) -> None:
    """From our checkpoint and from the folder of transformers itself."""
    cases: dict[int, dict[Any, tuple[Any, ...]]] = {1: {}, 2: {}}
    targets = {}
    for form in FORMS:
        folder = tmp_path / form.replace(" ", "-")
        theirs = written(form, folder / "theirs")
        made = adopt(Folder.open(folder / "theirs"), folder / "ours")
        targets[form] = expected(theirs)
        cases[1][form, "folder"] = (answers, folder / "theirs", made.settings, {})
        cases[2][form, "tensor"] = (answers, folder / "ours", made.settings, {"model_parallel_size": 2})
        layout = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 3}
        cases[2][form, "pipeline"] = (answers, folder / "ours", made.settings, layout)
    assert any(len(text) > 3 for _, texts in targets.values() for text in texts)
    for world_size, own in cases.items():
        for (form, name), ranks in run_cases(own, world_size).items():
            for losses, text in ranks:
                assert losses == pytest.approx(targets[form][0], rel=1e-5), (form, name)
                assert text == ([] if name == "pipeline" else targets[form][1]), (form, name)


def logits_of(rank: int, world_size: int, keys: dict[str, Any]) -> Tensor:
    """The largest difference of cached logits, step by step, from one pass over the full target."""
    config = resolve([], keys, Resources(world_size)).config
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, backend="gloo")
    spec = ModelSpec(
        config.model,
        config.initialization,
        config.kernels,
        padded_vocab_size=VOCABULARY,
        topology=topology,
        seed=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    stage = build_stage(build_layer_specs(spec), topology)
    unused = partial(KVCache, 0)
    plain = InferenceEngine(stage, topology, unused, CarryShape(64), VOCABULARY, torch.float32)  # type: ignore[arg-type]
    engine = EncoderDecoderEngine.of(plain, 3, ModelDims.of(config.model))
    given = batch()
    lengths = given["real"].sum(1).tolist()
    target = torch.cat((torch.full((3, 1), 3), given["target"][:, 1:]), dim=1)
    carry = torch.cat((given["source"], target), dim=1)
    with torch.inference_mode():
        for layer in stage.functions:
            carry = layer(carry, None, given["starts"])
    cache = engine.new_cache(3, SOURCE + TARGET).rows(0, 3)
    cache.reset()
    cache.set_valid_lengths(lengths)
    found = [engine.logits(given["source"], cache, torch.tensor([0]))]
    for step in range(1, TARGET):
        cache.set_lengths([length + step - 1 for length in lengths])
        found.append(engine.logits(target[:, step : step + 1], cache)[:, 0])
    return (torch.stack(found) - carry).abs().max()


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_cached_logits_are_those_of_a_full_pass(positions: str) -> None:
    keys: dict[str, Any] = {**LENGTHS, "train_impl": "t5", "pack_impl": "unpacked", "pos_emb": positions}
    keys |= {"encoder_num_layers": 2, "decoder_num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    keys |= {"num_kv_heads": 2, "user_script": "generate.py", "init_method_std": 0.2, "precision": "fp32"}
    (found,) = run_cases({positions: (logits_of, keys)}, 1)[positions]
    assert float(found) < 1e-4


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"feed_forward_proj": "tanh"}, "can be taken over"),
        ({"is_decoder": True}, "only False can be taken over"),
        ({"is_encoder_decoder": False}, "only True can be taken over"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings: dict[str, Any], reported: str, tmp_path: Path) -> None:
    written("t5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ConfigError, match=reported):
        adopt(Folder.open(tmp_path), tmp_path / "ours")


def test_a_tied_model_of_version_1_1_has_no_factor(tmp_path: Path) -> None:
    """Transformers 5 makes such models; for earlier releases an export has the output layer as a matrix of its own."""
    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path / "theirs")
    assert "lm_head.weight" not in load_file(tmp_path / "theirs" / "model.safetensors")
    settings = Folder.open(tmp_path / "theirs").settings()
    assert (settings["no_weight_tying"], settings["logit_scale"]) == (False, 1.0)
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"logit_scale = 1\.0: releases before 5 .* --own-head"):
        export(open_model(tmp_path / "ours"), tmp_path / "back", family_name="t5")
    export(open_model(tmp_path / "ours"), tmp_path / "back", options=ExportOptions(own_head=True))
    back = T5ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    given = batch()
    inputs = {"input_ids": given["source"], "decoder_input_ids": given["target"]}
    with torch.no_grad():
        one, other = (each(**inputs).logits for each in (model, back))
    assert torch.equal(one, other)


def test_other_names_of_keys_are_read(tmp_path: Path) -> None:
    written("t5", tmp_path)
    before = Folder.open(tmp_path).settings()
    config = json.loads((tmp_path / "config.json").read_text())
    for name, key in ALIASES["t5"].items():
        config[name] = config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Folder.open(tmp_path).settings() == before


def test_megatrons_form_is_refused_by_name(tmp_path: Path) -> None:
    written("t5", tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    model = open_model(tmp_path / "ours").model.model_copy(update={"pos_emb": "learned", "softmax_scale": None})
    lines = [str(issue) for issue in FAMILIES["t5"].misfits(model)]
    assert any("pos_emb" in line for line in lines) and any("softmax_scale" in line for line in lines)


def test_an_embedding_of_its_own_in_a_stack_is_refused_and_one_under_another_name_is_read(tmp_path: Path) -> None:
    transformers_t5(next(iter(FORMS))).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    expected = stored["shared.weight"].clone()
    for second in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        save_file({**stored, second: expected + 1.0}, file, {"format": "pt"})
        with pytest.raises(ConfigError, match=f"the stored {second} is not shared.weight"):
            adopt(Folder.open(tmp_path), tmp_path / "ours")
        save_file({**stored, second: expected}, file, {"format": "pt"})
        adopt(Folder.open(tmp_path), tmp_path / second)
    alone = {name: value for name, value in stored.items() if name != "shared.weight"}
    save_file({**alone, "encoder.embed_tokens.weight": expected}, file, {"format": "pt"})
    adopt(Folder.open(tmp_path), tmp_path / "alone")
    stored_model = open_model(tmp_path / "alone")
    (shape,) = [one for one in stored_model.table if one.name == "word_embeddings.weight"]
    assert torch.equal(stored_model.full_tensor(shape)[: len(expected)], expected)
