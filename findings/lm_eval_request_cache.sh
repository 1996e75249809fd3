#!/usr/bin/env bash
# lm-eval 0.4.13, cache_requests=True: the file that holds a task's requests is named by task, number of examples, rank,
# chat flags and tokenizer, and not by what the task asks. After an edit of doc_to_text the requests of before come back,
# and the scores are those of the old prompts.
# Seen: the second evaluation, whose prompt is "B: one", asks for "A: one". This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check lm-eval==0.4.13 2>/dev/null
mkdir "$work/tasks"
printf '{"text": "one", "target": " x"}\n' > "$work/docs.jsonl"
task() {
  cat > "$work/tasks/edited.yaml" <<YAML
task: edited
dataset_path: json
dataset_kwargs: {data_files: {test: $work/docs.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "$1: {{text}}"
doc_to_target: "{{target}}"
metric_list: [{metric: perplexity}]
YAML
}
cat > "$work/check.py" <<'PY'
import sys

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Printing(LM):
    """Prints the contexts that it is asked to score."""

    tokenizer_name = "none"

    def loglikelihood(self, requests):
        print("asked", [request.args[0] for request in requests])
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
lm_eval.simple_evaluate(model=Printing(), tasks=["edited"], task_manager=manager, cache_requests=True, bootstrap_iters=0)
PY

export LM_HARNESS_CACHE_PATH="$work/cache" HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
run() { "$work/venv/bin/python" "$work/check.py" "$work/tasks" 2>/dev/null | grep asked; }
task A
first=$(run)
task B
second=$(run)
echo "doc_to_text 'A: ...': $first"
echo "doc_to_text 'B: ...': $second"
[ "$first" = "asked ['A: one']" ] && [ "$second" = "asked ['A: one']" ]
