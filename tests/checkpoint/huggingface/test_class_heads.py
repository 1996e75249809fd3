"""Classifiers over Megatron's BERT of transformers become ours and go back: bits, labels, logits and three steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForSequenceClassification,
    MegatronBertConfig,
    MegatronBertForMultipleChoice,
    MegatronBertForSequenceClassification,
    RobertaConfig,
    RobertaForMultipleChoice,
    RobertaForSequenceClassification,
)

from megatron.checkpoint.huggingface.export_model import export
from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.load.loader import find_checkpoint, read_weights
from megatron.checkpoint.load.stored_model import open_model
from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, tensors
from tests.checkpoint.huggingface.test_bert import VOCABULARY, encoder
from tests.model.sections import disturb
from tests.multi_rank import run_cases

LENGTH, LR, ROWS = 16, 1e-3, 6
KINDS: dict[str, Any] = {
    "classes": (MegatronBertConfig, MegatronBertForSequenceClassification),
    "answers": (MegatronBertConfig, MegatronBertForMultipleChoice),
    "bert classes": (BertConfig, BertForSequenceClassification),
    "bert answers": (BertConfig, BertForMultipleChoice),
    "roberta classes": (RobertaConfig, RobertaForSequenceClassification),
    "roberta answers": (RobertaConfig, RobertaForMultipleChoice),
}
ANSWERS = {kind: 3 if kind.endswith("answers") else 1 for kind in KINDS}
LABELS = {kind: [2, 0] if kind.endswith("answers") else [0, 2, 1, 1, 0, 2] for kind in KINDS}
NAMES = ["no", "maybe", "yes"]


def make(kind: str) -> Any:
    return encoder(*KINDS[kind], **({"id2label": dict(enumerate(NAMES))} if ANSWERS[kind] == 1 else {}))


def tokens() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(6))


def losses(rank: int, world_size: int, load: Path, settings: dict[str, Any], kind: str) -> list[float]:
    """The losses of three steps of Adam, with tensor parallelism on two ranks."""
    choices = ANSWERS[kind]
    keys = {**settings, "load": str(load), "seq_length": LENGTH, "train_iters": 3, "finetune": True}
    keys |= {"train_batch_size": ROWS // choices, "optimizer": {"type": "Adam", "params": {"lr": LR}}}
    keys |= {"weight_decay": 0.0, "gradient_clipping": 0.0, "distributed_backend": "gloo"}
    keys |= {"model_parallel_size": world_size, "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1}
    keys |= {"task_train_data": ["x.jsonl"], "task_choices": choices if choices > 1 else None}
    config = resolve(
        [], {name: value for name, value in keys.items() if value is not None}, Resources(world_size)
    ).config
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=world_size, seed=1, backend="gloo")
    checkpoint = find_checkpoint(config, tensors(ModelDims.of(config.model), VOCABULARY))
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
    labels, counted = torch.zeros(ROWS, LENGTH, dtype=torch.long), torch.zeros(ROWS, LENGTH)
    labels[::choices, 0], counted[::choices, 0] = torch.tensor(LABELS[kind]), 1.0
    starts, types = torch.zeros(2, ROWS, LENGTH, dtype=torch.int64)
    batch = MicroBatch(tokens(), labels, counted, document_starts=starts, token_types=types)
    return [float(engine.train_step(iter([batch]), LR).loss) for _ in range(3)]


def expected(theirs: Any, kind: str) -> list[float]:
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    shape = (ROWS, LENGTH) if ANSWERS[kind] == 1 else (-1, ANSWERS[kind], LENGTH)
    found = []
    for _ in range(3):
        loss = theirs(tokens().view(shape), labels=torch.tensor(LABELS[kind])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_there_and_back_changes_no_bit_and_training_is_theirs(tmp_path: Path) -> None:
    cases, targets = {}, {}
    for kind, (_, made) in KINDS.items():
        theirs, folder = make(kind), tmp_path / kind
        theirs.save_pretrained(folder / "theirs")
        settings = adopt(Folder.open(folder / "theirs"), folder / "ours").settings
        assert settings["train_impl"] == "classification"
        export(open_model(folder / "ours"), folder / "back")
        back = made.from_pretrained(folder / "back")
        config = json.loads((folder / "back/config.json").read_text())
        assert config["architectures"] == [made.__name__]
        if ANSWERS[kind] == 1:
            assert list(back.config.id2label.values()) == NAMES == settings["task_labels"]
        before, after = theirs.state_dict(), back.state_dict()
        assert before.keys() == after.keys()
        assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
        targets[kind] = expected(theirs, kind)
        cases[kind] = (losses, folder / "ours", settings, kind)
    on_two = {kind: case for kind, case in cases.items() if not kind.startswith("roberta")}
    for world_size, own in ((1, cases), (2, on_two)):
        for kind, ranks in run_cases(own, world_size).items():
            for found in ranks:
                assert found == pytest.approx(targets[kind], rel=1e-5), (kind, world_size)


def test_several_labels_at_once_are_refused(tmp_path: Path) -> None:
    theirs = make("classes")
    theirs.config.problem_type = "multi_label_classification"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="problem_type"):
        adopt(Folder.open(tmp_path), tmp_path / "ours")


def test_the_first_bert_s_names_and_a_pretrained_folder_are_read(tmp_path: Path) -> None:
    """Gamma and beta of norms; a head that the model has not is left out, and a classifier's begins anew."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = BertForPreTraining(BertConfig(**sizes, intermediate_size=176, max_position_embeddings=32))
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    stored = {}
    for name, value in load_file(file).items():
        for new, former in old.items():
            name = name.replace(new, former) if name.endswith(new) else name
        stored[name] = value
    save_file(stored, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    folder = Folder.open(tmp_path)
    settings = folder.settings()
    assert settings["bert_binary_head"] is False
    masked = resolve([], {**settings, "seq_length": LENGTH, "user_script": "convert_from_hf.py"}, Resources(1)).config
    weights = folder.weights(ModelDims.of(masked.model))
    norm = weights.shards("2.attention_output_layernorm.weight")[0]
    assert torch.equal(norm, theirs.state_dict()["bert.encoder.layer.0.attention.output.LayerNorm.weight"])
    assert not any("pooler" in key for key in set(weights.keys()))

    keys = {**settings, "train_impl": "classification", "bert_binary_head": None, "task_labels": NAMES}
    keys |= {"pretrained_checkpoint": str(tmp_path), "load": str(tmp_path), "finetune": True, "seq_length": LENGTH}
    given = {name: value for name, value in keys.items() if value is not None and name != "pack_impl"}
    tuned = resolve([], {**given, "user_script": "convert_from_hf.py"}, Resources(1)).config
    checkpoint = find_checkpoint(tuned, tensors(ModelDims.of(tuned.model), VOCABULARY))
    assert checkpoint is not None and checkpoint.new_head
    found = read_weights(checkpoint, Topology.single(), checkpoint.table)
    assert torch.equal(found["6.pooler.weight"], theirs.state_dict()["bert.pooler.dense.weight"])
    missing = {f"{shape.layer}.{shape.name}" for shape in checkpoint.table} - found.keys()
    assert missing == {"6.classifier.weight", "6.classifier.bias"}

    keys = {**given, "train_impl": "ict", "data_path": "x", "retrieval_projection_size": 8}
    keys = {name: value for name, value in keys.items() if name not in ("task_labels", "lm_head")}
    both = resolve([], {**keys, "user_script": "convert_from_hf.py"}, Resources(1)).config
    checkpoint = find_checkpoint(both, tensors(ModelDims.of(both.model), VOCABULARY))
    assert checkpoint is not None
    pair = read_weights(checkpoint, Topology.single(), checkpoint.table)
    encoder = {name for name in found if not name.startswith("6.")}
    for name in encoder:
        layer, _, rest = name.partition(".")
        assert torch.equal(pair[name], found[name]) and torch.equal(pair[f"{int(layer) + 7}.{rest}"], found[name])
    missing = {f"{shape.layer}.{shape.name}" for shape in checkpoint.table} - pair.keys()
    assert missing == {f"{layer}.projection.{kind}" for layer in (6, 13) for kind in ("weight", "bias")}
    assert len(pair) == 2 * len(encoder)
    assert torch.equal(pair["9.attention_output_layernorm.weight"], norm)  # the first block of the second encoder


@pytest.mark.parametrize("labels", [{"1": "a", "2": "b"}, ["a", "b"], {"0": "a", "1": "a"}, {"0": "a"}])
def test_names_of_classes_that_are_none_are_refused(labels: Any, tmp_path: Path) -> None:
    make("classes").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": labels}))
    with pytest.raises(ConfigError, match="id2label"):
        Folder.open(tmp_path).settings()
