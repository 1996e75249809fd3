"""Megatron-LM's `PUT /api`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from fastapi import FastAPI, Request, Response

from megatron.serving.api_context import ApiContext, GenerationOptions, require_text
from megatron.serving.requests import MegatronRequest


def add_megatron(app: FastAPI, desk: ApiContext) -> None:
    """PUT /api: each prompt with its answer, whole and parted into tokens.

    The segments of a text are its tokens' parts of it, so that they put together are the text. A token without text
    there, such as a begin token that the tokenizer put before the prompt, has an empty one.
    """

    @app.put("/api", response_model=None)
    async def api(body: MegatronRequest, request: Request) -> Response | dict[str, Any]:
        desk.check(request)
        prompts = [desk.tokens(prompt) for prompt in body.prompts]
        likeliest = 0 if body.logprobs else None
        options = GenerationOptions(
            body.sampling(),
            body.tokens_to_generate,
            body.stops(),
            body.random_seed,
            tokens=True,
            likeliest=likeliest,
        )
        texts = desk.begin(prompts, options)
        records = await texts.all(request.is_disconnected)
        if records is None:
            return Response(status_code=400)
        require_text(records)
        answers, segments = [], []
        for prompt, ids, record, tokens in zip(body.prompts, prompts, records, texts.tokens, strict=True):
            text = prompt + (record.text or "")
            offsets = [*desk.words.offsets_in(prompt, ids), *(len(prompt) + each.offset for each in tokens), len(text)]
            answers.append(text)
            segments.append([text[start:end] for start, end in pairwise(offsets)])
        answer: dict[str, Any] = {"text": answers, "segments": segments}
        if body.logprobs:
            answer["logprobs"] = [[token.log_probability for token in tokens] for tokens in texts.tokens]
        return answer
