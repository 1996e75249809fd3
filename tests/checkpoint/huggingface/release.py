"""What one release of transformers makes of folders: run as a program, with that release on PYTHONPATH.

python -m tests.checkpoint.huggingface.release write FOLDER   draws models of every family and saves them there
python -m tests.checkpoint.huggingface.release read FOLDER    answers for every folder below it
Both put `answers.pt` beside the folders: name -> logits, and for tokenizers name -> ids. All of a model is made float32
before it computes: 4.57.6 makes the factors of xIELU in bfloat16, also in a model of float32, and writes them so.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.huggingface.random_models import DRAWN, attention_of, tokens
from tests.checkpoint.huggingface.tokenized import READ, SAMPLES
from tests.packages import installed

OLDER = "4.57.6"
_PACKAGES = (f"transformers=={OLDER}", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
EACH = 8  # models of a family
Answers = dict[str, Any]


def run(release: str, task: str, folder: Path) -> Answers:
    """Runs this program under a release: the installed one, or OLDER."""
    path = [str(installed(f"transformers-{OLDER}", *_PACKAGES))] if release == OLDER else []
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(root)]), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", __spec__.name, task, str(folder)], cwd=root, env=environment, check=True)
    found: Answers = torch.load(folder / "answers.pt")
    if release == OLDER:
        assert found["release"] == OLDER
    return found


def _write(folder: Path) -> Answers:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    found: Answers = {}
    for family, drawn in DRAWN.items():
        for seed in range(EACH):
            position = folder / f"{family}-{seed}"
            position.mkdir(parents=True)
            reported = drawn(random.Random(f"{family} {seed}")) | {"model_type": family}
            if transformers.__version__ == OLDER and "rope_parameters" in reported:
                continue  # a spelling that it does not know
            if transformers.__version__ == OLDER and family == "deepseek_v2" and "mscale_all_dim" in str(reported):
                continue  # its scores of V2 do without the factor, which those of V3 and of later releases have
            if transformers.__version__ == OLDER and family == "mamba2" and reported["n_groups"] > 1:
                continue  # its norm is of all groups together, that of later releases and of mamba-ssm of each
            (position / "config.json").write_text(json.dumps(reported))
            torch.manual_seed(5)
            try:
                config = AutoConfig.from_pretrained(position)
                model = AutoModelForCausalLM.from_config(config, **attention_of(position)).eval()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
                    model.save_pretrained(position)
                    found[position.name] = model.float()(tokens()).logits
            except Exception:
                continue
    return found


def _read(folder: Path) -> Answers:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: Answers = {}
    for position in sorted(path.parent for path in folder.glob("*/config.json")):
        model = AutoModelForCausalLM.from_pretrained(position, **attention_of(position)).eval().float()
        with torch.no_grad():
            found[position.name] = model(tokens()).logits
        if (position / "tokenizer_config.json").is_file():
            found[f"{position.name} ends"] = (model.config.eos_token_id, model.generation_config.eos_token_id)
            tokenizer = AutoTokenizer.from_pretrained(position)
            ids = [
                tokenizer.encode(text, add_special_tokens=add) for add in (False, True) for text in (*SAMPLES, *READ)
            ]
            spelt = [tokenizer.decode(each, skip_special_tokens=skip) for each in ids for skip in (False, True)]
            found[f"{position.name} ids"] = [*ids, *spelt, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return found


if __name__ == "__main__":
    import transformers

    work = {"write": _write, "read": _read}[sys.argv[1]]
    answers = work(Path(sys.argv[2])) | {"release": transformers.__version__}
    torch.save(answers, Path(sys.argv[2]) / "answers.pt")
