"""The demo model with a chat template in the style of Qwen, which has reasoning and tool calls."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import offmoe
from offmoe.dialogue.answer import Call, Reasoning, Text
from offmoe.dialogue.messages import Message
from offmoe.dialogue.render import ChatRenderer, Prompt
from offmoe.dialogue.sampling import Sampling
from offmoe.dialogue.templates import QWEN
from offmoe.hf.hub.locate import locate
from offmoe.serve.engine import Engine
from offmoe.serve.job import Broke, Ended, Job, Request, Update
from tests.doubles import wait_until

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}{% for call in message.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""


def write_chat_demo(folder: Path) -> Path:
    """Write the model into `folder`."""
    shutil.copytree(locate("demo").folder, folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": CHAT_TEMPLATE, "response_template": QWEN.template}))
    return folder


def load_chat_demo(folder: Path, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, on the CPU with half of its experts in slots, and its tokenizer."""
    options = {"device": "cpu", "slots_per_layer": 4, "max_context": 1024, **options}
    return offmoe.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)


def prompt_of(tokenizer: PreTrainedTokenizerBase, *texts: str) -> Prompt:
    """The prompt of a conversation: texts of user and assistant in turns."""
    roles = ("user", "assistant")
    return ChatRenderer(tokenizer).render([Message(roles[i % 2], text) for i, text in enumerate(texts)])


class Listening:
    """A job whose updates a test reads."""

    def __init__(self, engine: Engine, request: Request):
        self.updates: queue.Queue[Update] = queue.Queue()
        self.job = Job(request, self.updates.put)
        engine.submit(self.job)

    def all(self, timeout: float = 60.0) -> list[Update]:
        """All updates, to the end."""
        updates = []
        while True:
            updates.append(self.updates.get(timeout=timeout))
            if isinstance(updates[-1], Ended | Broke):
                return updates


def ask(engine: Engine, prompt: Prompt, is_chat: bool = True, **sampling: Any) -> list[Update]:
    """All updates of one answer."""
    return Listening(engine, Request(prompt, Sampling(**sampling), is_chat)).all()


def text_of(updates: Sequence[Update]) -> str:
    return "".join(update.text for update in updates if isinstance(update, Text))


def reasoning_of(updates: Sequence[Update]) -> str:
    return "".join(update.text for update in updates if isinstance(update, Reasoning))


def calls_of(updates: Sequence[Update]) -> list[tuple[str, dict[str, Any]]]:
    return [(update.call.name, dict(update.call.arguments)) for update in updates if isinstance(update, Call)]


def ended(updates: Sequence[Update]) -> Ended:
    last = updates[-1]
    assert isinstance(last, Ended), last
    return last


@contextmanager
def held_until_cancelled(engine: Engine, passes: int = 3) -> Iterator[threading.Event]:
    """Answers stop after some forward passes until somebody cancels them -> set when the first one stops.

    An answer is then under way for as long as a test needs, on a machine of any speed.
    """
    stopped, numbers = threading.Event(), count()

    def hold(*_: object) -> None:
        job = engine.running_here.job
        if next(numbers) >= passes:
            stopped.set()
            wait_until(lambda: job.is_cancelled)

    hook = engine.model.register_forward_pre_hook(hold)
    try:
        yield stopped
    finally:
        hook.remove()


@contextmanager
def saying(engine: Engine, text: str) -> Iterator[None]:
    """Let the engine's model say a text and end, whatever it is asked."""
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]

    def force(model: Any, args: Any, output: Any) -> Any:
        count = engine.running_here.num_tokens
        wanted = ids[count] if count < len(ids) else min(engine.end_tokens)
        output.logits.fill_(-30.0)
        output.logits[:, -1, wanted] = 30.0
        return output

    hook = engine.model.register_forward_hook(force)
    try:
        yield
    finally:
        hook.remove()
