"""An encoder-decoder from text to checkpoint: preprocessing, training, resuming in the same and another layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from megatron.config import Resources, resolve
from megatron.config.schema.data import DataSection
from megatron.data.dataset.span_builder import SpanData
from megatron.inference import runner as inference_run
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.masking import span_tokens
from tests.data import test_masked_samples as masked
from tests.end_to_end.runs import BASE, run, run_all, series
from tests.multi_rank import RankFailedError, run_cases
from tests.serving.service import running

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"{first}{second}" for first in ("ka", "lo", "mi", "ne", "su") for second in ("ra", "to", "vi", "ze")]
T5: dict[str, Any] = {"train_impl": "t5", "pack_impl": "unpacked", "num_layers": None, "seq_length": None}
T5 |= {"max_position_embeddings": None, "encoder_num_layers": 1, "decoder_num_layers": 1, "num_kv_heads": 4}
T5 |= {"encoder_seq_length": 32, "decoder_seq_length": 16, "eval_interval": 4, "train_iters": 9}
MEGATRON = {**T5, "pos_emb": "learned", "norm": "layernorm", "activation": "gelu", "no_weight_tying": False}
PUBLIC = {**T5, "pos_emb": "relative", "norm": "rmsnorm", "activation": "geglu_tanh", "softmax_scale": 1.0}
FORMS = {"megatron": MEGATRON, "public": PUBLIC}
EXACT = ("train/lm_loss", "train/grad_norm", "validation/lm_loss")


def tool(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Documents of sentences that count up in one word list, so that a model can learn what is left out."""
    folder, generator = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(80):
            sentences = []
            for start in generator.integers(0, len(WORDS)) + np.arange(generator.integers(3, 12)):
                words = [WORDS[(start + step) % len(WORDS)] for step in range(generator.integers(3, 7))]
                sentences.append(" ".join(words).capitalize() + ".")
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    source, vocabulary = str(folder / "text.jsonl"), str(folder / "vocab.txt")
    tool("train_tokenizer.py", "--input", source, "--tokenizer-type", "WordPiece", "--vocab-size", "90",
         "--extra-ids", "8", "--tokenizer-output-path", vocabulary)  # fmt: skip
    kind = ("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", vocabulary)
    tool("preprocess_data.py", "--input", source, "--output-prefix", str(folder / "d"), "--split-sentences", *kind)
    return {
        "data_path": str(folder / "d_text_sentence"),
        "split": "90,10,0",
        "tokenizer_type": "BertWordPieceLowerCase",
        "vocab_file": vocabulary,
    }


@pytest.mark.parametrize("form", FORMS)
def test_two_resumes_change_nothing_and_any_layout_continues(form: str, data: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, bit by bit; without it, another layout continues within 1e-5."""
    keys = {**data, **FORMS[form], "hidden_dropout": 0.1, "attention_dropout": 0.1}
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    runs = run_all(
        1, tmp_path, {"full": keys, "first": {**keys, **saved, "exit_interval": 5}, "rest": {**keys, **saved}}
    )
    for name in EXACT:
        both = series(runs["first"], name) + series(runs["rest"], name)
        assert both == series(runs["full"], name) != [], name

    calm = {**data, **FORMS[form], "train_iters": 6}
    here = {"save": str(tmp_path / "other"), "checkpoint_factor": 100}
    one = run_all(1, tmp_path / "one", {"full": calm, "first": {**calm, **here, "exit_interval": 3}})
    layout = {"pipe_parallel_size": 2} if form == "public" else {"model_parallel_size": 2}
    other = run(2, tmp_path / "two", **{**calm, **here, "load": here["save"], **layout})
    assert series(other, "train/lm_loss") == pytest.approx(series(one["full"], "train/lm_loss")[3:], rel=1e-5)


PROMPTS = ["kara <extra_id_0> kavi kaze lora.", "Mito mivi <extra_id_0>", "nera"]


def answer(rank: int, world_size: int, settings: dict[str, Any]) -> list[list[str]]:
    """What generate.py writes, and what the text service answers one prompt after another and all together."""
    inference_run.shutdown = lambda: None
    config = resolve([], settings, Resources(world_size)).config
    inference_run.generate(config)
    found = [[json.loads(line)["text"] for line in Path(settings["sample_output_file"]).read_text().splitlines()]]

    def ask(engine: Any, tokenizer: Any, topology: Any) -> None:
        length = inference_run.context_length(config.for_inference())
        with running(engine=engine, tokenizer=tokenizer, length=length) as service:

            def post(prompt: str | list[str], **more: Any) -> Any:
                body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
                reply = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
                return reply.json() if reply.status_code == 200 else reply.text

            found.append([post(prompt)["choices"][0]["text"] for prompt in PROMPTS])
            found.append([choice["text"] for choice in post(PROMPTS)["choices"]])
            found.append([post(PROMPTS[0], echo=True, logprobs=1)])

    inference_run.with_loaded_model(config.for_inference(), ask)
    return found


def test_generated_text_is_that_of_transformers(data: dict[str, Any], tmp_path: Path) -> None:
    """generate.py and the service from a cache, the texts side by side."""
    keys = {**data, **PUBLIC, "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "num_kv_heads": 4}
    keys |= {"mlp_multiple_of": 2, "train_iters": 80, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}
    keys |= {"eval_interval": 100}
    run(1, tmp_path, **{**keys, "save": str(tmp_path / "save"), "checkpoint_factor": 100})
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    settings = {**BASE, **keys, "load": str(tmp_path / "save"), "user_script": "generate.py", "maximum_tokens": 8}
    settings |= {"sample_input_file": str(tmp_path / "prompts.txt"), "sample_output_file": str(tmp_path / "out.jsonl")}
    settings |= {"generation_batch_size": 2, "distributed_backend": "gloo"}
    (found,) = run_cases({"one": (answer, settings)}, 1)["one"]

    tool("convert_to_hf.py", "--input-dir", str(tmp_path / "save"), "--output-dir", str(tmp_path / "theirs"))
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    tokenizer = make_tokenizer("BertWordPieceLowerCase", vocab_file=data["vocab_file"])
    special = tokenizer.special_tokens
    assert theirs.config.decoder_start_token_id == special["[BOS]"]
    expected = []
    for prompt in PROMPTS:
        source = torch.tensor([tokenizer.encode_with_special_tokens(prompt)])
        made = theirs.generate(source, max_new_tokens=8, do_sample=False, eos_token_id=special["[EOS]"])
        expected.append(tokenizer.decode([int(token) for token in made[0, 1:] if token != special["[EOS]"]]))
    assert all(expected), expected
    plain = [[text or "" for text in texts] for texts in found[:3]]
    assert plain == [expected] * 3
    assert "has no scores of the text that it reads" in found[3][0]


@pytest.mark.long
def test_it_restores_spans(data: dict[str, Any], tmp_path: Path) -> None:
    """The words follow a list, so those of a span follow from the words beside it, but not how long sentences are."""
    keys = {"train_iters": 500, "eval_interval": 500, "eval_iters": 4, "train_batch_size": 16}
    keys |= {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}, "encoder_num_layers": 2, "decoder_num_layers": 2}
    records = run(1, tmp_path, **{**data, **PUBLIC, **keys})
    tokens = span_tokens(make_tokenizer("BertWordPieceLowerCase", vocab_file=data["vocab_file"]), 2)
    section = DataSection(data_path=data["data_path"], split="1,0,0", num_workers=0)
    batches = masked.built(section, SpanData(tokens, 32, 16), length=48, train=400).train.batches()
    labels = torch.cat([batch.labels[batch.loss_mask > 0] for batch in batches])
    shares = labels.bincount().float() / len(labels)
    of_frequencies = float(-(shares * shares.clamp(min=1e-9).log()).sum())
    assert series(records, "validation/lm_loss")[-1] < 0.5 * of_frequencies


def test_a_vocabulary_without_sentinels_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    pieces = [line for line in Path(data["vocab_file"]).read_text().splitlines() if not line.startswith("<extra_id_")]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    with pytest.raises(RankFailedError, match=r"lacks 2 sentinels, <extra_id_0> and on \(it has 0\)"):
        run(1, tmp_path, **{**data, **MEGATRON, "vocab_file": str(tmp_path / "vocab.txt")})
