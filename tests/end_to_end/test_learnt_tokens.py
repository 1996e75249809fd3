"""Tokens that a tokenizer adds to a model's: adapters with their rows learn them, and are put on the model by peft.

The base is a small model with random weights; its tokenizer gets the two marks of a conversation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron.checkpoint.huggingface import peft_modules
from megatron.config import Resources, resolve
from megatron.training.trainer import train
from tests.checkpoint.huggingface.tokenized import FOLDERS
from tests.end_to_end.runs import NeverStop
from tools import convert_from_hf, convert_to_hf, preprocess_data_with_chat_template, reshape_checkpoint

MARKS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWER = "the lazy dog"
QUESTION = {"role": "user", "content": "fox?"}
BOTH = ["embedding", "head"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the base, its import, the tokenizer and conversations; and the keys of training from the import."""
    folder = tmp_path_factory.mktemp("learnt")
    FOLDERS["llama 3, base"](folder / "base")
    tokenizer = FastTokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    (folder / "marked").mkdir()
    tokenizer.save(str(folder / "marked" / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": MARKS[1], "chat_template": TEMPLATE}
    (folder / "marked" / "tokenizer_config.json").write_text(json.dumps(named))
    turns = [QUESTION, {"role": "assistant", "content": ANSWER}]
    (folder / "turns.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 64)
    arguments = ["--input", str(folder / "turns.jsonl"), "--output-prefix", str(folder / "turns")]
    arguments += ["--tokenizer-path", str(folder / "marked"), "--jsonl-keys", "messages"]
    assert preprocess_data_with_chat_template.main(arguments) == 0
    assert convert_from_hf.main(["--input-dir", str(folder / "base"), "--output-dir", str(folder / "import")]) == 0
    model = yaml.safe_load((folder / "import" / "model.yml").read_text())
    data = {f"{part}_data_paths": [str(folder / "turns_messages_document")] for part in ("train", "valid", "test")}
    data |= {
        f"{part}_label_data_paths": [str(folder / "turns_messages_label_document")]
        for part in ("train", "valid", "test")
    }
    settings = {"load": str(folder / "import"), "finetune": True, "vocab_file": str(folder / "marked/tokenizer.json")}
    settings |= {"seq_length": 32, "train_batch_size": 8, "eval_iters": 0, "checkpoint_factor": 1000}
    settings |= {"optimizer": {"type": "Adam", "params": {"lr": 0.03}}, "lr_decay_style": "constant"}
    unlike = ("eos_token_ids", "vocab_size", "make_vocab_size_divisible_by")
    return folder, {**{key: value for key, value in model.items() if key not in unlike}, **data, **settings}


def tune(keys: dict[str, Any], save: Path, **more: Any) -> None:
    settings = {**keys, "save": str(save), "log_dir": str(save / "logs"), "user_script": "train.py", **more}
    train(resolve([], settings, Resources(1)).config, NeverStop())


def convert(load: Path, output: Path, *more: str) -> int:
    return convert_to_hf.main(["--input-dir", str(load), "--output-dir", str(output), *more])


def answered(model: PreTrainedModel | PeftModel, tokenizer: Any) -> str:
    """What the model adds to the question, to the token that ends its turn or so far."""
    given = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        found = model.generate(**given, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(found[0][given["input_ids"].shape[1] :]))


def test_new_tokens_are_learnt_beside_adapters(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The model ends its turn with the new token, and peft makes the same model of base and adapter as the export."""
    folder, keys = prepared
    tune(keys, tmp_path / "save", lora={"rank": 4, "targets": "all", "modules_to_save": BOTH}, train_iters=80)
    assert convert(tmp_path / "save", tmp_path / "full") == 0
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    for layer in (full.get_input_embeddings(), full.get_output_embeddings()):
        assert (layer.weight[-1] - layer.weight[-2]).abs().max() > 0.1, "the rows of the two new tokens differ"
    assert convert(tmp_path / "save", tmp_path / "alone", "--adapter-only", "--base-model", str(folder / "base")) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "alone")
    assert answered(full, tokenizer) == ANSWER + MARKS[1]
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(len(tokenizer))
    ids = torch.arange(len(tokenizer)).flip(0)[None, :40]
    for model in (
        PeftModel.from_pretrained(base, tmp_path / "alone").eval(),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone").eval(),  # it reads the tokenizer, and resizes
    ):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, full(ids).logits, rtol=1e-5, atol=1e-5)


WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": ({"lora": {"rank": 4}}, "embedding and the output layer"),
    "the embedding alone": ({"lora": {"rank": 4, "modules_to_save": ["embedding"]}}, "output layer"),
    "a prompt": ({"soft_prompt_tuning": {"num_tokens": 2}}, "embedding and the output layer"),
}
"""Keys of the training, and what of the new rows stays frozen."""


@pytest.mark.parametrize("way", WAYS)
def test_frozen_new_rows_make_no_adapter(
    way: str,
    prepared: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what the checkpoint says, in another layout and in a later part of the run too, or by the base's folder."""
    folder, keys = prepared
    added, frozen = WAYS[way]
    tune(keys, tmp_path / "save", **added, train_iters=1)
    on = {"finetune": False, "load": str(tmp_path / "save"), "override_lr_scheduler": True}
    tune({**keys, **on}, tmp_path / "save", **added, train_iters=2)
    load = ["--load-dir", str(tmp_path / "save"), "--save-dir", str(tmp_path / "two")]
    assert reshape_checkpoint.main([*load, "--target-tensor-parallel-size=2"]) == 0
    for stored, more in ((True, ()), (False, ("--base-model", str(folder / "base")))):
        if not stored:  # as in a checkpoint of an earlier release
            monkeypatch.setattr(peft_modules, "stored_base", lambda directory: None)
        for name in ("save", "two"):
            assert convert(tmp_path / name, tmp_path / "alone", "--adapter-only", *more) == 2
            reported = capsys.readouterr().err
            assert "the tokenizer has 2 tokens that the base model has no rows for" in reported
            assert f"the new rows of the {frozen} were not trained" in reported
            assert "modules_to_save: [embedding, head]" in reported
            assert not (tmp_path / "alone").exists()


def test_rows_that_a_base_has_beyond_its_tokens_stay(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Its 2,000 rows have the new tokens too: nothing is refused, and the adapter has as many, so none is resized."""
    _, keys = prepared
    FOLDERS["unnamed end"](tmp_path / "base")
    for name, more in (("rows", {"modules_to_save": BOTH}), ("none", {})):
        tune({**keys, "load": str(tmp_path / "base")}, tmp_path / name, lora={"rank": 4, **more}, train_iters=2)
        assert convert(tmp_path / name, tmp_path / f"{name}-alone", "--adapter-only", "--no-save-tokenizer") == 0
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        tuned = PeftModel.from_pretrained(base, tmp_path / f"{name}-alone")
        assert tuned(input_ids=torch.tensor([[5, 7]])).logits.shape[-1] == 2000


def test_an_earlier_run_s_rows_stay_with_its_adapters(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A second tuning of the adapters alone is still beside rows that are not the base's."""
    folder, keys = prepared
    tune(keys, tmp_path / "first", lora={"rank": 4, "modules_to_save": BOTH}, train_iters=2)
    tune({**keys, "load": str(tmp_path / "first")}, tmp_path / "second", lora={"rank": 4}, train_iters=2)
    assert convert(tmp_path / "second", tmp_path / "alone", "--adapter-only", "--no-save-tokenizer") == 0
    assert convert(tmp_path / "second", tmp_path / "full") == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    base.resize_token_embeddings(full.config.vocab_size)
    ids = torch.arange(full.config.vocab_size).flip(0)[None, :40]
    with torch.no_grad():
        said = PeftModel.from_pretrained(base, tmp_path / "alone").eval()(input_ids=ids).logits
        torch.testing.assert_close(said, full(ids).logits, rtol=1e-5, atol=1e-5)
