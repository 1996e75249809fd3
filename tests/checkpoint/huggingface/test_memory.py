"""Conversion holds a few layers, and up to 1 GiB of a model that is written as one file: its own memory does not grow
with the model, both ways.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[3]
WATCH = """
import sys, threading, time
sys.path.insert(0, ".")
from megatron.checkpoint.offline import write_resharded
from tools import convert_from_hf, convert_to_hf

write_resharded._IN_MEMORY = 16 << 20  # this model is smaller than 1 GiB

def own_memory():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], own_memory())
        time.sleep(0.002)

tool, theirs, ours, *further = sys.argv[1:]
before = own_memory()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
main = convert_from_hf.main if tool == "from" else convert_to_hf.main
assert main(["--input-dir", theirs, "--output-dir", ours, *further]) == 0
print("PEAK", peak[0] - before)
"""


def peak(tool: str, source: Path, target: Path, *further: str) -> int:
    """Most bytes of memory of its own that a conversion takes beyond what its imports took."""
    command = [sys.executable, "-c", WATCH, tool, str(source), str(target), *further]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return int(said.split("PEAK")[1])


def test_the_peak_is_a_few_layers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8
    )
    with torch.device("cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    layer = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    assert size > 150e6
    assert peak("from", tmp_path / "theirs", tmp_path / "whole") < 6 * layer
    layers = ("--target-tensor-parallel-size=2", "--target-pipeline-parallel-size=2")
    assert peak("from", tmp_path / "theirs", tmp_path / "layers", *layers) < 6 * layer
    assert peak("to", tmp_path / "layers", tmp_path / "back") < 6 * layer
