"""The exported folder in lm-eval: it scores a continuation as our own model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.huggingface.import_model import adopt
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_inference_engine
from tests.checkpoint.huggingface.models import save
from tests.checkpoint.huggingface.test_pretrained import CACHE
from tools import convert_to_hf

pytestmark = pytest.mark.registry

ASK = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=1)
pairs = [("the cat", " sat"), ("a b c", " d e f")]
requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
scores = [score for score, _ in model.loglikelihood(requests)]
ids = [model._encode_pair(*pair) for pair in pairs]
print("ANSWER" + json.dumps([scores, ids]))
"""


def write_tokenizer(path: Path) -> None:
    """Words of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, **{chr(code): code - 31 for code in range(33, 127)}, "Ġ": 95}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))


def test_lm_eval_scores_it_as_we_do(tmp_path: Path) -> None:
    if not (CACHE / "packages" / "accelerate").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", CACHE / "packages"]
        subprocess.run([*pip, "accelerate"], check=True)
    save("neox", tmp_path / "theirs")
    made = adopt(Folder.open(tmp_path / "theirs"), tmp_path / "ours")
    write_tokenizer(tmp_path / "tokenizer.json")
    arguments = [f"--input-dir={tmp_path / 'ours'}", f"--output-dir={tmp_path / 'back'}"]
    assert convert_to_hf.main([*arguments, f"--tokenizer={tmp_path / 'tokenizer.json'}"]) == 0
    environment = {**os.environ, "PYTHONPATH": str(CACHE / "packages"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK, str(tmp_path / "back")]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    scores, ids = json.loads(said.split("ANSWER")[1])
    reported = {**made.settings, "load": str(tmp_path / "ours"), "seq_length": 64, "user_script": "generate.py"}
    engine = build_inference_engine(resolve([], reported, Resources(1)).config.for_inference(), Topology.single(), 96)
    for score, (context, continuation) in zip(scores, ids, strict=True):
        tokens = torch.tensor([context + continuation])
        chances = engine.logits(tokens)[0].log_softmax(-1)
        positions = range(len(context) - 1, tokens.shape[1] - 1)
        assert score == pytest.approx(sum(float(chances[i, tokens[0, i + 1]]) for i in positions), rel=1e-4)
