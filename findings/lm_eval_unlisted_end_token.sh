#!/usr/bin/env bash
# lm-eval 0.4.13: `local-completions` asks for an echo of prompt and answer with `max_tokens: 1`, and leaves out the last
# entry of `token_logprobs` as the one token that was generated. A server that lists no entry for a generated end of
# text, which adds nothing to the text, therefore loses the answer's own last token: an answer of one token scores 0.0
# and counts as greedy, so each choice of a task is as likely as any other. Nothing is reported.
# Seen: of the same context of two tokens and answer of one, with a log-probability of -3.5, a response that lists the
# end token gives (-3.5, False), and one that does not gives (0, True). This script fails when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/env/bin/pip" install --quiet --disable-pip-version-check 'lm_eval[api]==0.4.13' transformers==5.23.0 accelerate==1.12.0

cat > "$work/check.py" <<'PY'
from lm_eval.models.openai_completions import LocalCompletionsAPI

TOKENS = ["Q", ":", " red", "<|endoftext|>"]
SCORES = [None, -2.0, -3.5, -0.25]
LIKELIEST = [None, {" a": -0.5, ":": -2.0}, {" blue": -0.75, " red": -3.5}, {"<|endoftext|>": -0.25}]


def response(listed):
    logprobs = {"tokens": TOKENS[:listed], "token_logprobs": SCORES[:listed], "top_logprobs": LIKELIEST[:listed]}
    return {"choices": [{"index": 0, "text": "Q: red", "finish_reason": "stop", "logprobs": logprobs}]}


print([LocalCompletionsAPI.parse_logprobs(response(listed), ctxlens=[2])[0] for listed in (4, 3)])
PY
found=$("$work/env/bin/python" "$work/check.py" 2>/dev/null | tail -1)
echo "$found"
[ "$found" = "[(-3.5, False), (0, True)]" ]
