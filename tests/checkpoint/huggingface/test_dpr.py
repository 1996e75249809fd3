"""DPR's two encoders of transformers become one model and go back bit by bit; embeddings of texts are theirs to 1e-5.

A wrong name, order of encoders, projection, tokenizer or id of padding breaks these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder, DPRReader

from megatron.checkpoint.huggingface.encoder_pair import PAIR, open_folder
from megatron.checkpoint.huggingface.families import family_for
from megatron.config import Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_inference_engine
from megatron.errors import ConfigError
from megatron.retrieval.encoder import TextEncoder
from megatron.tokenizers.builder import build_tokenizer
from megatron.tokenizers.masking import class_tokens
from tests.model.sections import disturb
from tests.multi_rank import run_cases
from tools import convert_from_hf, convert_to_hf

CLASSES: tuple[Any, Any] = (DPRQuestionEncoder, DPRContextEncoder)
WORDS = ["who", "wrote", "hamlet", "a", "play", "by", "shakespeare", "##s", "is", "first", "the", "in", "."]
QUESTIONS = ["Who wrote Hamlet", "what is a play"]
PASSAGES = [("Hamlet", "Hamlet is a play by Shakespeare."), ("", "Plays"), ("Plays", "A first play is by who .")]
PIECES = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "[PAD]"]
KINDS: dict[str, tuple[int, int]] = {"plain": (0, 1), "projection": (5, 2), "shared": (5, 2)}
"""Name -> projection, and tensor-parallel degree of the files."""


def write(folder: Path, tower: int, projection: int = 5, model_class: Any = None, **more: Any) -> Any:
    """An encoder with its tokenizer; each tensor has values of its own."""
    torch.manual_seed(4 + tower)
    sizes = {"vocab_size": len(PIECES), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 24, "pad_token_id": PIECES.index("[PAD]")}
    config = DPRConfig(**{**sizes, "projection_dim": projection, "initializer_range": 0.1, **more})
    model = (model_class or CLASSES[tower])(config).eval()
    disturb(model)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def as_published(folder: Path, module: str) -> None:
    """The weights as a .bin file with a pooler, which the class leaves out, and with position ids."""
    stored = load_file(folder / "model.safetensors")
    pooler = {"weight": torch.ones(32, 32), "bias": torch.ones(32)}
    stored |= {f"{module}.bert_model.pooler.dense.{kind}": value for kind, value in pooler.items()}
    stored[f"{module}.bert_model.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(stored, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def vectors(model: Any, folder: Path, texts: list[Any]) -> Tensor:
    """Embeddings of transformers: token types are 0 for all tokens, as in training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(*([text] if isinstance(text, str) else filter(None, text))) for text in texts]
    given = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    with torch.no_grad():
        found: Tensor = model(given["input_ids"]).pooler_output  # hides the padding by itself
    return found


def ours(rank: int, world_size: int, load: Path, keys: dict[str, Any]) -> list[Tensor]:
    """Embeddings of questions and passages."""
    keys = {**keys, "load": str(load), "model_parallel_size": world_size, "distributed_backend": "gloo"}
    config = resolve([], {**keys, "user_script": "convert_from_hf.py"}, Resources(world_size)).config.for_inference()
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=world_size, seed=1, backend="gloo")
    engine, tokenizer = build_inference_engine(config, topology, len(PIECES)), build_tokenizer(config.tokenizer)
    shared = config.model.retrieval_shared_encoder
    found = []
    for tower, texts in enumerate(([("", text) for text in QUESTIONS], PASSAGES)):
        sizes: dict[str, Any] = {"towers": 1 if shared else 2, "seq_length": 24, "types": True}
        encoder = TextEncoder(engine, tokenizer, class_tokens(tokenizer), tower=tower, **sizes)
        found.append(encoder.embed(encoder.rows(texts)))
    return found


def imported(folder: Path, *more: str, model_size: int = 1) -> int:
    """Runs the import of folder/questions."""
    sizes = f"--target-tensor-parallel-size={model_size}"
    return convert_from_hf.main([f"--input-dir={folder / 'q'}", f"--output-dir={folder / 'ours'}", sizes, *more])


def test_there_and_back_changes_no_bit_and_embeddings_are_theirs(tmp_path: Path) -> None:
    """By the tools, from one rank and two; `load` reads both folders as they are."""
    cases: dict[int, dict[Any, tuple[Any, ...]]] = {1: {}, 2: {}}
    expected = {}
    for kind, (projection, model_size) in KINDS.items():
        folder = tmp_path / kind
        theirs = [write(folder / name, tower, projection) for tower, name in enumerate("qp")]
        theirs[1:] = theirs[:1] if kind == "shared" else theirs[1:]
        if kind == "plain":
            as_published(folder / "q", "question_encoder")
        more = "--shared-encoder" if kind == "shared" else f"--passage-dir={folder / 'p'}"
        assert imported(folder, more, model_size=model_size) == 0
        back = folder / "back"
        assert convert_to_hf.main([f"--input-dir={folder / 'ours'}", f"--output-dir={back}"]) == 0
        for name, model, made in zip(PAIR, theirs, CLASSES, strict=True):
            before = {key.partition(".")[2]: value for key, value in model.state_dict().items()}
            read = made.from_pretrained(back / name)
            after = {key.partition(".")[2]: value for key, value in read.state_dict().items()}
            assert before.keys() == after.keys()
            assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
            assert read.config.pad_token_id == PIECES.index("[PAD]")
        texts = (QUESTIONS, PASSAGES)
        models = [made.from_pretrained(back / name) for name, made in zip(PAIR, CLASSES, strict=True)]
        expected[kind] = [vectors(*each) for each in zip(models, (back / name for name in PAIR), texts, strict=True)]
        keys = yaml.safe_load((folder / "ours" / "model.yml").read_text())
        assert keys["train_impl"] == "dpr" and keys.get("retrieval_shared_encoder", False) == (kind == "shared")
        cases[3 - model_size][kind] = (ours, folder / "ours", keys)
        if kind == "projection":
            cases[2][kind, "load"] = (ours, back, keys)
            assert open_folder(back).passages is not None
    for world_size, own in cases.items():
        for name, ranks in run_cases(own, world_size).items():
            for found in ranks:
                for one, other in zip(found, expected[name if isinstance(name, str) else name[0]], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=f"{name}")


def test_folders_that_are_no_pair_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "q", 0)
    write(tmp_path / "p", 1)
    write(tmp_path / "wide", 1, hidden_size=64)
    write(tmp_path / "reader", 1, 0, DPRReader)
    write(tmp_path / "cased", 1)
    for path in (tmp_path / "cased").glob("tokenizer*.json"):
        path.write_text(path.read_text().replace('lowercase": true', 'lowercase": false'))
    write(tmp_path / "unnamed", 1)
    config = json.loads((tmp_path / "unnamed" / "config.json").read_text())
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    cases = {
        ("q",): "the encoder of passages is a DPRContextEncoder, and this is a DPRQuestionEncoder",
        ("wide",): "that of the encoder of questions is 32, and a model has one for both",
        ("cased",): "one tokenizer reads the texts of both",
        ("reader",): "only DPRQuestionEncoder and DPRContextEncoder can be taken over",
        ("unnamed",): "write which of them it is: [DPRQuestionEncoder]",
        ("p", "--shared-encoder"): "leave --shared-encoder out",
        ("p", f"--adapter={tmp_path}"): "an adapter of an encoder of questions or passages cannot be taken over",
        (): "this is the DPRQuestionEncoder of a model of two encoders",
    }
    for names, reported in cases.items():
        more = [f"--passage-dir={tmp_path / names[0]}", *names[1:]] if names else []
        assert imported(tmp_path, *more) == 2, names
        assert reported in capsys.readouterr().err, names
        assert not (tmp_path / "ours" / "tokenizer").exists()
    swapped = [f"--input-dir={tmp_path / 'p'}", f"--passage-dir={tmp_path / 'q'}", f"--output-dir={tmp_path / 'ours'}"]
    assert convert_from_hf.main(swapped) == 2
    assert capsys.readouterr().err.count("the encoder of ") == 2


def test_a_model_with_norms_before_its_blocks_is_no_dpr() -> None:
    """And no other family is named, of which it could be even less."""
    keys: dict[str, Any] = {"train_impl": "dpr", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    keys |= {"seq_length": 24, "pos_emb": "learned", "norm": "layernorm", "activation": "gelu"}
    config = resolve([], {**keys, "user_script": "convert_from_hf.py"}, Resources(1)).config
    with pytest.raises(ConfigError, match="a DPR model has 'post'") as reported:
        family_for(config.model, config.moe, config.mixers)
    assert {issue.key for issue in reported.value.issues} == {"norm_placement", "embedding_norm"}
