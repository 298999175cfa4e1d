"""`offmoe chat MODEL`: talk with a model on the terminal, or answer one prompt from a pipe.

Ctrl-C ends the answer only, Ctrl-D the chat. Nothing is sent anywhere: the engine runs in this process.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offmoe.cli import options, prompts
from offmoe.cli.choices import say_what_is_faster
from offmoe.cli.interrupt import interrupts
from offmoe.cli.model import open_model
from offmoe.cli.output import Output
from offmoe.cli.state_file import check_state
from offmoe.errors import ConfigError, OffmoeError
from offmoe.extras import require
from offmoe.text import format_size, percent

if TYPE_CHECKING:
    from offmoe.cli.chat_commands import State
    from offmoe.dialogue.render import ChatRenderer
    from offmoe.serve.engine import Engine
    from offmoe.serve.job import Update, Usage


def parser() -> options.Parser:
    parser = options.Parser("chat", "Talk with a model whose experts stay outside the device.")
    options.add_loading(parser)
    group = parser.add_argument_group("answering")
    options.add_option(group, "--system", "TEXT", "what the model is told before the conversation")
    options.add_option(group, "--max-new-tokens", "N", "tokens of an answer at most", options.positive)
    temperature = "0 is greedy (default: as the model's generation_config says)"
    options.add_option(group, "--temperature", "T", temperature, float)
    options.add_option(group, "--seed", "N", "seed of sampling; the same seed gives the same answer", int)
    think = "let a model that can reason do so, or not (default: as its chat template does)"
    group.add_argument("--think", action=argparse.BooleanOptionalAction, help=think)
    options.add_cache(parser)
    options.add_state(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    check_state(args)
    interactive = sys.stdin is not None and sys.stdin.isatty() and not args.json
    if interactive:
        require("chat", "offmoe chat on a terminal", "prompt_toolkit")
    text = None if interactive else prompts.read_text("-", "stdin").strip()
    if text == "":
        raise ConfigError("stdin has no prompt; pipe a text into offmoe chat, or run it on a terminal.")
    with open_model(args, out) as opened:
        from offmoe.cli.chat_commands import State
        from offmoe.dialogue.conversation import Conversation
        from offmoe.dialogue.render import ChatRenderer
        from offmoe.dialogue.sampling import Sampling
        from offmoe.serve.engine import Engine

        sampling = Sampling(temperature=args.temperature, seed=args.seed, max_tokens=args.max_new_tokens)
        sampling.check()
        tokenizer = prompts.tokenizer_of(opened.inspected)
        renderer = ChatRenderer(tokenizer)
        if not renderer.has_template:
            raise ConfigError("the model's tokenizer has no chat template; use offmoe generate, which goes on a text.")
        template = {} if args.think is None else renderer.thinking(args.think)
        if template is None:
            raise ConfigError("--think: this model's chat template has no reasoning; leave the option out.")
        say_what_is_faster(args, opened.inspected, out)
        model, _ = opened.load(warm=True)
        with Engine(model, tokenizer) as engine:
            session = Session(engine, renderer, State(Conversation(args.system or ""), sampling), template)
            if text is None:
                _talk(session, out)
            else:
                _answer_once(session, text, out)


@dataclass
class Session:
    """One conversation with an engine. `template`: options of the chat template. `last`: tokens of the last answer."""

    engine: Engine
    renderer: ChatRenderer
    state: State
    template: dict[str, Any]
    last: Usage | None = None

    def answer(self, text: str) -> Iterator[Update]:
        """Ask, and give the updates of the answer as they come. Ctrl-C ends the answer; what there is of it is kept.

        Raises:
            OffmoeError: It cannot be answered; the conversation is as before.
        """
        from offmoe.dialogue.answer import Call, Reasoning, Text
        from offmoe.dialogue.messages import Message
        from offmoe.serve.job import Broke, Ended, Job, Request

        conversation = self.state.conversation
        question = Message("user", text)
        prompt = self.renderer.render([*conversation.messages, question], (), self.template)
        updates: queue.Queue[Update] = queue.Queue()
        job = Job(Request(prompt, self.state.sampling), updates.put)
        answer = Message("assistant")
        with interrupts(job.cancel):
            self.engine.submit(job)
            while True:
                try:
                    update = updates.get(timeout=0.2)  # a signal is handled between two waits
                except queue.Empty:
                    continue
                match update:
                    case Text(piece):
                        answer = replace(answer, text=answer.text + piece)
                    case Reasoning(piece):
                        answer = replace(answer, reasoning=answer.reasoning + piece)
                    case Call(call):
                        answer = replace(answer, calls=(*answer.calls, call))
                    case Broke(error):
                        raise error
                    case Ended():
                        self.last = update.usage
                        conversation.turns += [question, answer]
                        return
                yield update

    def stats(self) -> str:
        """The expert cache and the last answer, in two lines."""
        stats, memory = self.engine.offload.stats(), self.engine.offload.memory()
        filled = self.engine.offload.fill_progress().describe()
        lines = [
            f"experts: hit rate {percent(stats.hit_rate)} ({stats.hits} resident, {stats.pending} prefetched), "
            f"{stats.misses} misses, "
            f"{format_size(stats.disk_bytes)} read from disk, {stats.stall_s:.1f} s waited; "
            + (f"{filled}; " if filled else "")
            + memory.describe()
        ]
        if self.last is not None:
            lines.append(
                f"last answer: {self.last.prompt} prompt tokens, {self.last.cached} of them kept from before, "
                f"{self.last.completion} new"
            )
        return "\n".join(lines)


def _answer_once(session: Session, text: str, out: Output) -> None:
    """Answer one prompt, for scripts."""
    from offmoe.cli.chat_view import AnswerView

    with AnswerView(out.console()) as view:
        for update in session.answer(text):
            view.show(update)
    answer = session.state.conversation.turns[-1]
    assert session.last is not None
    out.json(
        {
            "text": answer.text,
            "reasoning": answer.reasoning,
            "tool_calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in answer.calls],
            "prompt_tokens": session.last.prompt,
            "new_tokens": session.last.completion,
            "stats": session.engine.offload.stats().to_dict(),
        }
    )


def _talk(session: Session, out: Output) -> None:
    """The loop of a terminal."""
    from offmoe.cli.chat_commands import run_command
    from offmoe.cli.chat_input import reader
    from offmoe.cli.chat_view import AnswerView

    out.note("/help lists the commands; Ctrl-D ends.")
    console = out.console()
    for line in reader():
        try:
            if line.startswith("/"):
                shown = run_command(line, session.state, session.stats)
                if shown is None:
                    return
                out.note(shown)
                continue
            with AnswerView(console) as view:
                for update in session.answer(line):
                    view.show(update)
        except OffmoeError as error:
            out.note(f"error: {error}")
