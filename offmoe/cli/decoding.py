"""How a verb generates: the command's options, and below them the model's generation_config.json.

The options decide between greedy decoding and sampling. Everything else that the file asks for is done as in
transformers. A strategy that gives no text before its end (beams, several texts) is shown when it is complete.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from offmoe.cli import prompts
from offmoe.errors import CheckpointError, ConfigError, OffmoeError, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.budget.inspect import Inspected
    from offmoe.cli.output import Output

logger = logging.getLogger(__name__)

REMEDY = "leave its settings out with --no-generation-config"


@dataclass(frozen=True)
class Decoding:
    """How the prompts of one command are continued.

    Args:
        options: For transformers' generate().
        rows: Sequences that are computed at the same time for one prompt: beams, or texts.
        streams: Whether new tokens are known before the end.
        asked: What generation_config.json asks for, for messages.
    """

    options: Mapping[str, Any]
    rows: int
    streams: bool
    asked: str

    @classmethod
    def of(
        cls, args: argparse.Namespace, inspected: Inspected, tokenizer: PreTrainedTokenizerBase, out: Output
    ) -> Decoding:
        """What a command's options and the model's generation_config.json ask for together.

        Raises:
            ConfigError: transformers cannot do that.
        """
        from transformers import GenerationConfig
        from transformers.generation.utils import GENERATION_MODES_MAPPING

        from offmoe.hf.load.generation import model_generation, plain_generation, settings

        read = plain_generation if inspected.asked.plain else model_generation
        config: GenerationConfig = read(inspected.generation_folder, inspected.hf_config)
        asked = ", ".join(f"{name}={value!r}" for name, value in settings(config).items())
        options = prompts.sampling(args)
        beams, texts = config.num_beams or 1, config.num_return_sequences or 1
        if beams == 1 and texts > 1 and not options["do_sample"]:
            out.note(f"one text, not {texts}: without --temperature or beams all would be equal")
            options["num_return_sequences"] = texts = 1
        if config.stop_strings or config.token_healing:
            options["tokenizer"] = tokenizer
        config.update(**{**options, "num_return_sequences": texts})
        mode = config.get_generation_mode()
        if "/" in GENERATION_MODES_MAPPING[mode]:
            raise ConfigError(
                f"generation_config.json asks for {mode.value.replace('_', ' ')} ({asked}), which transformers "
                f"downloads as code and offmoe does not run; {REMEDY}."
            )
        rows = max(beams, texts)
        if rows > 1:
            out.note(f"generation_config.json asks for {asked}: the text is shown when it is complete")
        if getattr(args, "cuda_graphs", None) and config.cache_implementation is None:
            options["cache_implementation"] = "static"  # a graph works on addresses that stay
        return cls(options, rows, rows == 1, asked)

    def new_tokens(self, limit: int | None, ids: Tensor, inspected: Inspected, out: Output) -> int:
        """How many tokens to generate after the prompt ids [1, n].

        Raises:
            CapacityError: The reserved context is too short.
        """
        # A decoder behind an encoder begins with a token of its own.
        prompt_tokens = ids.shape[1] + int(inspected.hf_config.is_encoder_decoder)
        tokens = prompts.fitting_tokens(limit, prompt_tokens, inspected.plan.max_context, out, rows=self.rows)
        longest = inspected.needs.bytes.context_limit
        if prompt_tokens + tokens - 1 > longest:
            out.note(
                f"the model is made for {longest} tokens; of {prompt_tokens + tokens}, those beyond may make no sense."
            )
        return tokens

    def generate(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, stream: prompts.NewTokens) -> list[Tensor]:
        """Continue a prompt.

        Args:
            model: The model.
            ids: The prompt, int64 [1, n].
            new_tokens: How many tokens to generate at most.
            stream: Gets new tokens as they come; if they are known at the end only, their number.

        Returns:
            The new tokens of each text, int64 [m].

        Raises:
            ConfigError: transformers cannot generate with the settings of generation_config.json.
            CheckpointError: The weights are damaged, or the dtype is too narrow.
        """
        ids = ids.to(model.device)
        watching: dict[str, Any] = {"streamer": stream} if self.streams else {"stopping_criteria": [_Steps(stream)]}
        with self._blamed():
            found = cast("Any", model.generate)(
                input_ids=ids,
                attention_mask=ids.new_ones(ids.shape),
                max_new_tokens=new_tokens,
                **watching,
                **self.options,
            )
        sequences: Tensor = getattr(found, "sequences", found)
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        return list(sequences[:, start:].cpu())

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """Turn whatever transformers raises about the file's settings into one line that names them."""
        try:
            yield
        except OffmoeError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and "probability tensor" in str(error):
                raise CheckpointError(
                    "the model's probabilities are not numbers. Many models overflow in float16: try --dtype bfloat16 "
                    "or float32. Otherwise the weights are damaged: download them again."
                ) from error
            if not self.asked or isinstance(error, AssertionError) or out_of_memory(error):
                raise
            logger.debug("generation failed", exc_info=True)
            raise ConfigError(
                f"generation_config.json asks for {self.asked}, and transformers cannot do that here "
                f"({type(error).__name__}: {error}); {REMEDY}."
            ) from error


class _Steps:
    """Stopping criterion that stops nothing and tells a stream of every step."""

    def __init__(self, stream: prompts.NewTokens):
        self._stream = stream

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        import torch

        self._stream.add(input_ids[:1, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
