"""One sequence of several: transformers' own `generate`, in a strand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria

from offmoe.rows.strand import Strand

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RowRequest:
    """One prompt, and how to continue it.

    Args:
        ids: Token ids of the prompt.
        new_tokens: Tokens to generate at most.
        options: Further arguments of transformers' `generate`, the row's own.
        seed: Seed of its random numbers; None: by chance.
        run: Generates, in place of `generate` with the options.
        count: How many tokens `run` has generated so far.
    """

    ids: Sequence[int]
    new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    run: Callable[[], Any] | None = None
    count: Callable[[], int] | None = None

    def settings(self, model: PreTrainedModel) -> GenerationConfig:
        """The settings of generate: those of the request, else the model's."""
        config: Any = self.options.get("generation_config") or model.generation_config or GenerationConfig()
        return config  # type: ignore[no-any-return]

    def option(self, model: PreTrainedModel, name: str) -> Any:
        """The value of one setting."""
        return self.options.get(name, getattr(self.settings(model), name, None))

    def sequences(self, model: PreTrainedModel) -> int:
        """Sequences that the model computes for the prompt: beams, or several answers."""
        beams, answers = self.option(model, "num_beams"), self.option(model, "num_return_sequences")
        return max(1, beams or 1, answers or 1)

    def context(self, model: PreTrainedModel) -> int:
        """Tokens of KV cache that it may take. The last token is not fed back."""
        return self.sequences(model) * (len(self.ids) + self.new_tokens - 1)


class Row:
    """A prompt under way.

    Args:
        model: The model.
        request: What to generate.
        index: Which prompt of the run it is.
        number: The number of its first sequence in recordings.
    """

    def __init__(self, model: PreTrainedModel, request: RowRequest, index: int, number: int):
        self.request, self.index = request, index
        self.sequences, self.context = request.sequences(model), request.context(model)
        self._counted = 0
        self._model = model
        self.strand = Strand(self._generate, samples=bool(request.option(model, "do_sample")))
        self._number = number

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, per sequence."""
        return self._counted if self.request.count is None else self.request.count()

    @property
    def is_prefilling(self) -> bool:
        """Whether it has no token yet."""
        return self.new_tokens == 0

    def numbers(self, sequences: int = 1) -> np.ndarray:
        """The numbers in recordings of its first sequences, int32 [sequences]."""
        return self._number + np.arange(sequences, dtype=np.int32)

    def enter_pass(self, ids: torch.Tensor | None) -> None:
        """Note the token ids [sequences, length] of its forward pass."""
        self.strand.tokens = ids
        self.strand.requests = self.numbers(self.sequences if ids is None else len(ids))

    def _generate(self) -> Any:
        request = self.request
        if self.strand.samples:  # numbers of its own, whatever the other rows draw
            if request.seed is None:
                torch.seed()
            else:
                torch.manual_seed(request.seed)
        if request.run is not None:
            return request.run()
        ids = torch.tensor([list(request.ids)], device=self._model.device)  # [1, n]
        options = dict(request.options)
        options["stopping_criteria"] = [*options.get("stopping_criteria", ()), _Counts(self._count, ids.shape[1])]
        generate: Any = self._model.generate
        output = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.new_tokens, **options
        )
        if getattr(output, "past_key_values", None) is not None:
            output.past_key_values = None  # the caches of all rows would not fit
        return output

    def _count(self, new_tokens: int) -> None:
        self._counted = new_tokens


class _Counts(StoppingCriteria):
    """Tells how many tokens a row has, and stops nothing."""

    def __init__(self, tell: Callable[[int], None], prompt_tokens: int):
        self._tell, self._prompt_tokens = tell, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """input_ids: [sequences, tokens so far] -> [sequences]."""
        self._tell(input_ids.shape[1] - self._prompt_tokens)
        none = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return none  # type: ignore[return-value]
