"""Answers the lines of a file with one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from offmoe.batch.lines import CHAT, Line
from offmoe.batch.results import Sink
from offmoe.dialogue.constraint import GrammarSource
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.sampling import COLDEST
from offmoe.dialogue.templates import response_format
from offmoe.errors import OffmoeError
from offmoe.rows.row import RowRequest
from offmoe.rows.session import Session
from offmoe.serve.answering import Answering
from offmoe.serve.http import chat, completions
from offmoe.serve.http.asking import Answer
from offmoe.serve.http.errors import openai_error
from offmoe.serve.http.service import Service
from offmoe.serve.job import Job, Request
from offmoe.serve.kept import NOTHING, OFF, KeptCaches
from offmoe.serve.meters import Meters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.handle import Offload
    from offmoe.serve.engine import Engine


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    lines: answered or failed in this run. tokens: generated in this run.
    """

    lines: int
    tokens: int


@dataclass
class _Asked:
    """A line whose answers are computed: one per row."""

    line: Line
    asked: chat.Asked
    answers: list[Answer]
    open: int
    error: OffmoeError | None = None


class Speaker(GrammarSource):
    """What reading requests and writing answers needs of a model: the part of the engine that computes nothing."""

    reuse_kind = NOTHING

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        self.offload = cast("Offload", model.offload)
        self.max_context = self.offload.memory().max_context
        self.answers = response_format(tokenizer, model.config.model_type)
        self.meters = Meters()
        self.chunk = self.offload.prefill_chunk(1, self.max_context)
        self.kept = KeptCaches(self.max_context, self.chunk, OFF, NOTHING)


@dataclass
class Batch:
    """A run over lines.

    Args:
        model: The loaded model.
        tokenizer: Its tokenizer.
        names: What requests may call the model; results call it by the first.
        fingerprint: Of the model and its options, for results.
        created: Seconds since 1970 for results. The same for all, so that a run that was killed and went on gives the
            same file.
        default_tokens: Tokens of an answer whose request says nothing.
        batch_size: Rows under way at the same time; None: as many as pay.
        batch_invariant: As in `generate_many`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str]
    fingerprint: str
    created: int
    default_tokens: int
    batch_size: int | None = None
    batch_invariant: bool | None = None
    session: Session | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._speaker = Speaker(self.model, self.tokenizer)
        # Reading bodies asks an engine for its tokenizer, formats and grammars only.
        self._service = Service(cast("Engine", self._speaker), self.names, strict=True, strict_by="")

    def run(self, lines: Sequence[Line], results: Sink, tell: Callable[[Progress], None]) -> None:
        """Answer the lines that have no result yet. Their errors become results.

        Args:
            lines: The lines.
            results: Where results go.
            tell: Called after every line.
        """
        rows: list[tuple[_Asked, int, Answering]] = []
        ended = 0
        for line in lines:
            if results.is_done(line):
                continue
            try:
                rows += self._rows(line)
            except RequestError as error:
                results.add(line, failed_result(line, error), failed=True)
                ended += 1
                tell(Progress(ended, 0))
        requests = [self._row_request(answering) for _, _, answering in rows]
        session = self.session = self._speaker.offload.session(requests, self.batch_size, self.batch_invariant)
        with closing(session.run()) as finished:
            for row in finished:
                asked, _, answering = rows[row.index]
                if self._end(asked, answering, row.strand.error):
                    self._write(asked, results)
                    ended += 1
                tell(Progress(ended, session.tokens))

    def _rows(self, line: Line) -> list[tuple[_Asked, int, Answering]]:
        """The answers of a line. RequestError if it cannot be answered."""
        if line.error is not None:
            raise line.error
        read = chat.read if line.url == CHAT else completions.read
        asked = read(self._service, line.body)
        if asked.stream:
            raise RequestError("stream: a batch gives whole answers; leave it out.", "stream")
        found = _Asked(line, asked, [Answer() for _ in asked.requests], len(asked.requests))
        return [(found, i, self._answering(request, found.answers[i])) for i, request in enumerate(asked.requests)]

    def _answering(self, request: Request, answer: Answer) -> Answering:
        prompt, context = len(request.prompt.ids), self._speaker.max_context
        param = "messages" if request.is_chat else "prompt"
        if not prompt:
            raise RequestError("the prompt has no tokens; there is nothing to continue.", param)
        if prompt >= context:
            raise RequestError(
                f"the prompt has {prompt} tokens, and memory is reserved for {context} tokens of context.",
                param,
                "context_length_exceeded",
            )
        if request.sampling.logprobs is not None:
            raise RequestError("logprobs: a batch does not give them; leave them out.", "logprobs")
        asked = request.sampling.max_tokens or self.default_tokens
        job = Job(request, answer.add)
        return Answering(self._speaker, job, min(asked, context - prompt + 1), None)

    def _row_request(self, answering: Answering) -> RowRequest:
        sampling = answering.job.request.sampling
        samples = {} if sampling.temperature is None else {"do_sample": sampling.temperature >= COLDEST}
        return RowRequest(
            answering.job.request.prompt.ids,
            answering.new_tokens,
            {"num_beams": 1, "num_return_sequences": 1, **samples},
            sampling.seed,
            run=answering.run,
            count=lambda: answering.num_tokens,
        )

    def _end(self, asked: _Asked, answering: Answering, error: BaseException | None) -> bool:
        """Note the end of a row; whether the line is complete."""
        asked.open -= 1
        if error is None:
            answering.job.sink(answering.ended())
        elif isinstance(error, OffmoeError):
            asked.error = error
        elif isinstance(error, Exception):
            asked.error = RequestError(f"the answer failed: {type(error).__name__}: {error}", status=500)
        else:
            raise error
        return asked.open == 0

    def _write(self, asked: _Asked, results: Sink) -> None:
        line = asked.line
        if asked.error is not None:
            results.add(line, failed_result(line, asked.error), failed=True)
            return
        whole = chat.whole if line.url == CHAT else completions.whole
        body = {
            **whole(self._service, asked.asked, asked.answers),
            "id": f"batch-{line.digest}",
            "created": self.created,
            "system_fingerprint": self.fingerprint,
        }
        response = {"status_code": 200, "request_id": line.digest, "body": body}
        results.add(line, {**_head(line), "response": response, "error": None}, failed=False)


def failed_result(line: Line, error: OffmoeError) -> dict[str, Any]:
    """The result of a line that cannot be answered."""
    known = error if isinstance(error, RequestError) else RequestError(str(error), code="server_error", status=500)
    response = {"status_code": known.status, "request_id": line.digest, "body": openai_error(known)}
    reason = {"code": known.code or "invalid_request", "message": str(known), "line": line.number}
    return {**_head(line), "response": response, "error": reason}


def _head(line: Line) -> dict[str, Any]:
    return {"id": f"batch_req_{line.number}", "custom_id": line.custom_id}
