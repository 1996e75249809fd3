#!/usr/bin/env python
"""Tokenises conversations into token files and labels, by a model's chat template.

    python tools/preprocess_data_with_chat_template.py --input chats.jsonl --output-prefix data/chats
        --tokenizer-path MODEL_FOLDER --jsonl-keys messages --workers 8

A line's field holds the turns: [{"role": "user", "content": "..."}, ...], with calls of tools and parts that are texts;
`tools`, `documents` and `chat_template_kwargs` beside it go to the template. Writes `<prefix>_<key>_document`,
`<prefix>_<key>_label_document` (loss on what --generation-role wrote alone) and, with --reward-key,
`<prefix>_<key>_reward_document`. Flags and exit codes as tools/preprocess_data.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.preprocess.document_types import ChatText
from megatron.errors import ConfigError, RunError
from megatron.output_streams import run_tool
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers.chat_encoding import ChatTokens
from tools.preprocess_data import add_work_arguments, format_result, print_round_trip_losses, run_recipe, with_dashes


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Turn conversations into token files and labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--input", required=True, help="files or directories, with commas between them")
    result.add_argument("--jsonl-keys", nargs="+", default=["conversation"], help="fields that hold conversations")
    result.add_argument("--tokenizer-path", required=True, help="a folder with tokenizer.json and a chat template")
    result.add_argument("--generation-role", default="assistant", help="whose words carry a loss")
    result.add_argument("--only-last", action="store_true", help="a loss on the last turn alone, if it is of that role")
    result.add_argument("--no-mask", action="store_true", help="a loss on every token")
    result.add_argument("--for-rm", action="store_true", help="two ends of text, and a loss on the last one alone")
    result.add_argument("--reward-key", help="the field of a number, written into token files of its own")
    result.add_argument("--binary-reward", action="store_true", help="the reward is true or false: write 1 or -1")
    result.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="special tokens that a turn spells become their ids; otherwise such conversations are left out",
    )
    result.add_argument("--num-docs", type=int, help="how many documents there are, for the time left")
    result.add_argument("--ftfy", action="store_true", help="not for conversations; refused")
    add_work_arguments(result)
    return result


def recipe_of(args: argparse.Namespace, template: ChatTokens) -> ChatText:
    """Returns the document type. Raises ConfigError."""
    if args.ftfy:
        hint = "repair the text first, or leave out --ftfy"
        raise ConfigError.of("conversations are taken as they are", key="ftfy", value=True, hint=hint)
    return ChatText(
        template,
        tuple(key for group in args.jsonl_keys for key in group.split(",") if key),
        role=args.generation_role,
        only_last=args.only_last,
        mask=not args.no_mask,
        for_reward_model=args.for_rm,
        reward_key=args.reward_key,
        binary_reward=args.binary_reward,
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(with_dashes(sys.argv[1:] if arguments is None else arguments))
    try:
        template = ChatTokens(args.tokenizer_path, parse_special=args.parse_special_tokens)
        print_round_trip_losses(template.tokenizer)
        recipe = recipe_of(args, template)
        facts = describe_tokenizer("PretrainedFromHF", template.tokenizer)
        print(format_result(run_recipe(args, recipe, facts)))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
