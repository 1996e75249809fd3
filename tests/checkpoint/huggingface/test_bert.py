"""BERT, RoBERTa and Megatron's BERT of transformers become ours, go back bit by bit, and compute the same everywhere.

Logits of masked tokens and of the order, within 1e-5 in fp32; three steps of training equal those of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.families import FAMILIES
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_training_engine
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, tensors
from tests.model.sections import disturb
from tests.multi_rank import run_cases

VOCABULARY, LENGTH, LR = 96, 16, 1e-3
CLASSES: dict[str, Any] = {
    "pretraining": (MegatronBertConfig, MegatronBertForPreTraining),
    "masked": (MegatronBertConfig, MegatronBertForMaskedLM),
    "bert pretraining": (BertConfig, BertForPreTraining),
    "bert masked": (BertConfig, BertForMaskedLM),
    "roberta masked": (RobertaConfig, RobertaForMaskedLM),
}
Answers = tuple[Tensor, list[float]]


def encoder(settings: Any, model_class: Any, **more: Any) -> Any:
    """A small model without dropout, each of whose tensors has values of its own."""
    torch.manual_seed(4)
    config = settings(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=176,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **more,
    )
    model = model_class(config).eval()
    disturb(model)
    return model


def make(kind: str) -> PreTrainedModel:
    model: PreTrainedModel = encoder(*CLASSES[kind])
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    mask = (torch.rand(4, LENGTH, generator=generator) < 0.25).float()
    mask[:, 3] = 1
    return {
        "tokens": torch.randint(2, VOCABULARY, (4, LENGTH), generator=generator),
        "labels": torch.randint(0, VOCABULARY, (4, LENGTH), generator=generator) * mask.long(),
        "loss_mask": mask,
        "document_starts": torch.zeros(4, LENGTH, dtype=torch.int64),
        "token_types": (torch.arange(LENGTH).expand(4, -1) >= 5).long(),
        "sentence_order": torch.tensor([[0], [1], [0], [1]]),
    }


def answers(rank: int, world_size: int, load: Path, settings: dict[str, Any], layout: dict[str, Any]) -> Answers:
    """Logits of tokens without types, and the losses of three steps of Adam."""
    keys = {**settings, **layout, "load": str(load), "seq_length": LENGTH, "train_iters": 3, "finetune": True}
    keys |= {
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {"lr": LR}},
        "weight_decay": 0.0,
        "gradient_clipping": 0.0,
    }
    keys |= {"distributed_backend": "gloo", "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1}
    config = resolve([], keys, Resources(world_size)).config
    axes = config.parallelism
    topology = init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size, model_parallel_size=axes.model_parallel_size, seed=1, backend="gloo"
    )
    table = tensors(ModelDims.of(config.model), VOCABULARY)
    checkpoint = find_checkpoint(config, table)
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
    given = batch()
    if not config.model.bert_binary_head:
        del given["sentence_order"]
    logits = engine.logits(given["tokens"])
    count = config.training.gradient_accumulation_steps or 1
    batches = [MicroBatch(**{name: each.chunk(count)[part] for name, each in given.items()}) for part in range(count)]
    losses = []
    for _ in range(3):
        result = engine.train_step(iter(batches), LR)
        losses.append(float(result.loss) + float(result.more.get("sop_loss", 0.0)))
    return logits, losses


def expected(theirs: PreTrainedModel, kind: str) -> Answers:
    given = batch()
    with torch.no_grad():
        output = theirs(given["tokens"])
    logits = output.prediction_logits if kind.endswith("pretraining") else output.logits
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    labels = given["labels"].masked_fill(given["loss_mask"] == 0, -100)
    more = {"next_sentence_label": given["sentence_order"].flatten()} if kind.endswith("pretraining") else {}
    losses = []
    for _ in range(3):
        loss = theirs(given["tokens"], token_type_ids=given["token_types"], labels=labels, **more).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return logits, losses


@pytest.mark.parametrize(("kind", "model_size"), [*zip(CLASSES, (2, 1, 2, 1, 2), strict=True)])
def test_there_and_back_changes_no_bit(kind: str, model_size: int, tmp_path: Path) -> None:
    theirs = make(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours", model_size=model_size)
    made = export(open_model(tmp_path / "ours"), tmp_path / "back")
    assert made.family == CLASSES[kind][0].model_type.replace("-", "_")
    back = CLASSES[kind][1].from_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [CLASSES[kind][1].__name__]
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []


def test_logits_and_training_are_theirs_in_every_layout(tmp_path: Path) -> None:
    """From our checkpoint and from the folder of transformers itself."""
    cases: dict[int, dict[Any, tuple[Any, ...]]] = {1: {}, 2: {}}
    targets = {}
    for kind in CLASSES:
        theirs = make(kind)
        theirs.save_pretrained(tmp_path / kind / "theirs")
        made = adopt(Folder.open(tmp_path / kind / "theirs"), tmp_path / kind / "ours")
        targets[kind] = expected(theirs, kind)
        cases[1][kind, "folder"] = (answers, tmp_path / kind / "theirs", made.settings, {})
        cases[2][kind, "tensor"] = (answers, tmp_path / kind / "ours", made.settings, {"model_parallel_size": 2})
        layout = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}
        if kind in ("masked", "bert masked"):  # parts of the batch have other numbers of masked tokens
            cases[2][kind, "pipeline"] = (answers, tmp_path / kind / "ours", made.settings, layout)
    for world_size, own in cases.items():
        for (kind, name), ranks in run_cases(own, world_size).items():
            for logits, losses in ranks:
                torch.testing.assert_close(logits, targets[kind][0], rtol=1e-5, atol=1e-5, msg=f"{kind}, {name}")
                assert losses == pytest.approx(targets[kind][1], rel=1e-5), (kind, name)


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"hidden_act": "relu"}, "only gelu can be taken over"),
        ({"is_decoder": True}, "only False can be taken over"),
        ({"tie_word_embeddings": False}, "only True can be taken over"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' can be taken over"),
    ],
)
def test_settings_without_a_position_are_refused(settings: dict[str, Any], reported: str, tmp_path: Path) -> None:
    make("masked").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ConfigError, match=reported):
        adopt(Folder.open(tmp_path), tmp_path / "ours")


def test_a_modern_encoder_is_refused_by_name(tmp_path: Path) -> None:
    make("masked").save_pretrained(tmp_path / "theirs")
    adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    stored = open_model(tmp_path / "ours")
    model = stored.model.model_copy(update={"pos_emb": "rotary", "num_token_types": 0})
    lines = [str(issue) for issue in FAMILIES["megatron_bert"].misfits(model)]
    assert any("pos_emb" in line for line in lines) and any("adds the vectors of token types" in line for line in lines)


@pytest.mark.parametrize("kind", ["masked", "bert pretraining", "roberta masked"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_stored_copy_of_the_output_layer_is_compared(kind: str, part: str, tmp_path: Path) -> None:
    """Transformers uses one that differs as it is; the other name alone is the tensor."""
    make(kind).save_pretrained(tmp_path)
    prefix = "roberta" if kind.startswith("roberta") else "bert"
    first = {"weight": f"{prefix}.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}[part]
    second = f"cls.predictions.decoder.{part}"
    if prefix == "roberta":
        first, second = first.replace("cls.predictions.bias", "lm_head.bias"), f"lm_head.decoder.{part}"
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    expected = stored[first].clone()
    save_file({**stored, second: expected + 0.5}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"the stored {second} is not {first}"):
        adopt(Folder.open(tmp_path), tmp_path / "ours")
    renamed = {name: value for name, value in stored.items() if name != first} | {second: expected}
    save_file(renamed, file, {"format": "pt"})
    folder = Folder.open(tmp_path)
    config = resolve([], {**folder.settings(), "user_script": "convert_from_hf.py"}, Resources(1)).config
    weights = folder.weights(ModelDims.of(config.model))
    key = "0.word_embeddings.weight" if part == "weight" else "6.bias"
    assert torch.equal(weights.shards(key)[0], expected)
