"""Answers one at a time: jobs of all models wait for one thread, the only one that runs torch.

So whatever requests are in flight, each is answered as if it were alone: counters, scratch memory and
caches have one user, and two answers do not take the cores from each other.

Models are loaded in that thread too. Each thread that runs torch leaves a pool of OpenMP threads
behind, and where the pools have more threads than the machine has cores, GNU's OpenMP sleeps between
two regions in place of spinning: with a model loaded elsewhere the demo decoded 16 tokens/s,
not 28, on 2 cores.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from sparse_runtime.serve.answer import Answer
from sparse_runtime.serve.failures import RequestFailure, stopping
from sparse_runtime.serve.parts import Piece, answer_parser
from sparse_runtime.serve.requests import ChatRequest, GenerationRequest
from sparse_runtime.serve.served_model import Figures, ServedModel

_log = logging.getLogger(__name__)


class Job:
    """One answer, from the event loop's side; make it inside the loop.

    Args:
        served: the model.
        request: what is asked for.
        prompt: token ids.
        report: told what the answer took, also where nobody waits for it any more.

    Raises:
        RequestFailure: the prompt is too long, or the length that is asked for.

    Attributes:
        answer: that is generated.
        figures: what it took; None before its end.
    """

    def __init__(
        self,
        served: ServedModel,
        request: GenerationRequest,
        prompt: list[int],
        report: Callable[[Figures], None],
    ) -> None:
        length = served.limits.new_tokens(len(prompt), request.length)
        parser = None
        if isinstance(request, ChatRequest):
            parser = answer_parser(served.model, served.tokenizer, prompt, request.offered_tools)
        self.answer = Answer(
            served.tokenizer,
            self._put,
            end_tokens=served.end_tokens,
            stops=request.stops,
            parser=parser,
        )
        self.figures: Figures | None = None
        self._served, self._request, self._prompt = served, request, prompt
        self._report = report
        self._config = served.generation_config(request, length)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Figures | RequestFailure] = asyncio.Queue()
        self._future: Future[None] | None = None

    def run(self) -> None:
        """Generate; in the thread for that."""
        try:
            figures = self._served.generate(
                self._prompt, self._config, self.answer, seed=self._request.seed
            )
        except Exception as error:  # of whatever kind: it ends this answer, not the server
            _log.exception("an answer of %s failed", self._served.name)
            self._put(
                RequestFailure(
                    f"the answer failed ({type(error).__name__}); the server's log says where",
                    status=500,
                    kind="server_error",
                )
            )
        else:
            self._report(figures)
            self._put(figures)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The answer as it comes; whoever stops listening ends it.

        Raises:
            RequestFailure: the answer failed, or the server is stopping.
        """
        try:
            while not isinstance(item := await self._queue.get(), Figures):
                if isinstance(item, RequestFailure):
                    raise item
                yield item
            self.figures = item
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ask for its end, if it is not over."""
        self.answer.cancel()
        if self._future is not None:
            self._future.cancel()  # where it is still waiting

    def fail(self, failure: RequestFailure) -> None:
        """End it for a reason, from any thread."""
        self._put(failure)
        self.cancel()

    def start(self, submit: Callable[..., Future[None]]) -> None:
        """Line up for the thread."""
        self._future = submit(self.run)

    def _put(self, item: Piece | Figures | RequestFailure) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class Generator:
    """The thread that generates, and the jobs that wait for it in the order they came."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._jobs: set[Job] = set()
        self._stopping = False

    @property
    def jobs(self) -> int:
        """Answers that run or wait."""
        return len(self._jobs)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread, and wait for it."""
        return self._thread.submit(function).result()

    async def answer(self, job: Job) -> AsyncGenerator[Piece]:
        """Generate a job's answer, and yield it as it comes.

        Raises:
            RequestFailure: as of :meth:`Job.pieces`.
        """
        if self._stopping:
            raise stopping()
        self._jobs.add(job)
        try:
            job.start(self._thread.submit)
            async with aclosing(job.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            job.cancel()
            self._jobs.discard(job)

    def stop(self) -> None:
        """End all answers, with an error that says so, and take no more; from any thread."""
        self._stopping = True
        for job in list(self._jobs):
            job.fail(stopping())

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
