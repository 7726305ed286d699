"""An iterator that works ahead in a thread of its own, on a CUDA stream of its own."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch

from spectralar.training.data.workers import Answer


class _Made(NamedTuple):
    """One answer, and when the GPU has it; or what ended the iteration."""

    answer: Answer | None
    ready: torch.cuda.Event | None = None
    error: BaseException | None = None


class Ahead(Iterator[Answer]):
    """The same answers, of which up to `depth` are made before they are asked for.

    The thread ends, and `answers` is closed there, when the iteration ends, is closed or collected, or the interpreter
    ends. An error arrives in its place in the order.

    Args:
        answers: nothing else may use it.
        device: of the answers' tensors. On a GPU they are made on a stream of the thread, and the stream that is
            current where they are taken waits for them.
        depth: positive.
    """

    def __init__(self, answers: Generator[Answer, None, None], device: torch.device, *, depth: int) -> None:
        self._made: queue.SimpleQueue[_Made] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._device = device
        stopped = threading.Event()
        thread = threading.Thread(
            target=_make, args=(answers, device, self._made, self._room, stopped), name="spectralar loader", daemon=True
        )
        self._end = weakref.finalize(self, _stop, thread, self._room, stopped)
        # The interpreter ends what was registered last first: this thread before the libraries that it works with.
        atexit.register(self._end)
        thread.start()

    def __next__(self) -> Answer:
        made = self._made.get()
        if made.answer is None:
            self._made.put(made)  # asked again, it ends again
            self._end()
            raise made.error or StopIteration
        if made.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(made.ready)
            for tensor in made.answer.batch:
                tensor.record_stream(stream)
        self._room.release()
        return made.answer


def _make(
    answers: Generator[Answer, None, None],
    device: torch.device,
    made: queue.SimpleQueue[_Made],
    room: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    # Neither refers to the iterator that takes them, which could not be collected otherwise.
    gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if gpu else None
    try:
        with torch.cuda.stream(stream):
            while room.acquire() and not stopped.is_set():
                answer = next(answers)
                made.put(_Made(answer, stream.record_event() if stream is not None else None))
                del answer
        made.put(_Made(None))
    except StopIteration:
        made.put(_Made(None))
    except BaseException as error:
        made.put(_Made(None, error=error))
    finally:
        answers.close()


def _stop(thread: threading.Thread, room: threading.Semaphore, stopped: threading.Event) -> None:
    stopped.set()
    room.release()
    thread.join()
