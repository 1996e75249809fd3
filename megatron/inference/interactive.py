"""Interactive generation: a person types, the answer appears as it grows, and every turn follows from those before.

Ctrl-C stops the answer that is being written, never the session: the end of the input (Ctrl-D) does that. A blank line
is ignored, and a line that says `/new` forgets the turns so far.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Self, TextIO

from megatron.errors import RunError
from megatron.inference.batch_generation import TextGenerator

FORGET = "/new"


class Interruption:
    """Whether Ctrl-C was pressed since `clear`."""

    def __init__(self) -> None:
        self.pressed = False
        self.answering = False

    @classmethod
    def install(cls, say: Callable[[str], None]) -> Self:
        """One that listens to Ctrl-C from now on. say: prints how to leave the prompt."""
        found = cls()

        def pressed(_number: int, _frame: object) -> None:
            found.pressed = True
            if not found.answering:
                say("\n(Ctrl-D ends the session)\nprompt> ")

        signal.signal(signal.SIGINT, pressed)
        return found

    def clear(self, *, answering: bool) -> None:
        """An answer begins, or has ended."""
        self.pressed, self.answering = False, answering


def run_interactive(
    generator: TextGenerator,
    prompt_end: str,
    *,
    is_main_rank: bool,
    share: Callable[[Callable[[], str | None]], str | None],
    any_rank: Callable[[bool], bool] = bool,
    interruption: Interruption | None = None,
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> None:
    """Reads a prompt, prints its continuation as it grows, and so on until the input ends.

    Args:
        generator: The generator.
        prompt_end: The line that ends a prompt.
        is_main_rank: Whether this rank holds the terminal.
        share: Broadcasts its prompt to every rank, None at the end.
        any_rank: Whether something holds on any rank. A prompt is one line, or the lines up to one that ends with
            `prompt_end` when that is not a newline. The oldest turns are forgotten when the context is full.
        interruption: Listens to Ctrl-C.
        source: The terminal's input.
        target: The terminal's output.
    """
    source, target = source or sys.stdin, target or sys.stdout
    stop = interruption or Interruption()

    def say(text: str) -> None:
        if is_main_rank:
            target.write(text)
            target.flush()

    prompts = _typed(source, prompt_end, say) if is_main_rank else iter(())
    turns: list[str] = []
    index = 0
    while (prompt := share(lambda: next(prompts, None))) is not None:
        if prompt.strip() == FORGET:
            turns.clear()
            continue
        try:
            while turns and not generator.fits("".join(turns) + prompt):
                turns.pop(0)
            generator.read(prompt)
        except RunError as error:  # the same on every rank
            say(f"{error}\n")
            continue
        stop.clear(answering=True)
        record = generator.continue_text(
            "".join(turns) + prompt, text_index=index, stream=say, interrupted=lambda: any_rank(stop.pressed)
        )
        stop.clear(answering=False)
        say(f"\n{record.message}\n" if record.failed else "\n")
        turns.append(f"{prompt}{record.text or ''}\n")
        index += 1


def _typed(source: TextIO, prompt_end: str, say: Callable[[str], None]) -> Iterator[str]:
    """The prompts that a person types, without empty ones."""
    lines: list[str] = []
    say("prompt> ")
    for line in source:
        text = line.rstrip("\n")
        if prompt_end == "\n":
            prompt: str | None = text
        elif text.endswith(prompt_end):
            prompt = "\n".join([*lines, text.removesuffix(prompt_end)])
        else:
            lines.append(text)
            prompt = None
        if prompt is not None:
            lines.clear()
            if prompt.strip():
                yield prompt
            say("prompt> ")
    say("\n")
