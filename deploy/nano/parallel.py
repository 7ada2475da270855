"""A second process that takes one half of a step, on machines without a GPU.

Two processes of one thread each beat one of two threads by far when the cores are shared with
other work: threads meet at a barrier hundreds of times a step, processes once.
"""

import ctypes.util
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

import torch
from torch import Tensor

from deploy.nano.batches import Batch
from deploy.nano.network import Tensors, Trainee

Metrics = dict[str, float]
Share = dict[str, Batch]
_KEYS: Final = ("answer", "auxiliary", "right")
_LOG = logging.getLogger("nano.train")


def allocate_with_tcmalloc() -> None:
    """Start this program again with tcmalloc preloaded, where it is installed.

    Each step has tensors of other sizes. glibc maps big ones anew each time, or, told not to, scatters
    them over a heap that grows: within 150 steps every operation takes a sixth to a fifth longer.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    if library is None:
        _LOG.info("tcmalloc would save time (Debian: libtcmalloc-minimal4)")
    elif library not in os.environ.get("LD_PRELOAD", ""):
        preloaded = filter(None, [library, os.environ.get("LD_PRELOAD")])
        environment = {**os.environ, "LD_PRELOAD": ":".join(preloaded)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606


def run(
    trainee: Trainee, batches: dict[str, Tensors], bidirectional: bool, bf16: bool
) -> dict[str, Metrics]:
    """Add the gradients of micro-batches to the parameters and return the figures of each."""
    figures = {}
    for name, batch in batches.items():
        device = batch["ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            measured = trainee(batch, bidirectional and "xy" in batch)
        measured["loss"].backward()
        figures[name] = {key: float(measured[key].detach()) for key in _KEYS}
    return figures


class Side:
    """The process: `ask` starts its share of a step, `collect` adds its gradients to ours."""

    def __init__(
        self,
        trainee: Trainee,
        draw: Callable[[int], Share],
        take: Callable[[int, Share], dict[str, Metrics]],
    ) -> None:
        trainee.share_memory()
        self._parameters = [p for p in trainee.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = [
            torch.zeros_like(p).share_memory_() for p in self._parameters
        ]
        # fork: parameters, gradients and the bank are shared, not copied.
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=self._serve, args=(other, trainee, draw, take), daemon=True
        )
        self._process.start()
        other.close()

    def _serve(
        self,
        pipe: Connection,
        trainee: Trainee,
        draw: Callable[[int], Share],
        take: Callable[[int, Share], dict[str, Metrics]],
    ) -> None:
        # With its own copy of the other end it would wait for ever where the trainer was killed.
        self._pipe.close()
        drawn: dict[int, Share] = {}
        with suppress(EOFError, ConnectionError):
            while (step := pipe.recv()) is not None:
                figures = take(step, drawn.get(step) or draw(step))
                for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                    if parameter.grad is None:
                        gradient.zero_()
                    else:
                        gradient.copy_(parameter.grad)
                    parameter.grad = None
                pipe.send(figures)
                drawn = {step + 1: draw(step + 1)}  # while the parameters change

    def ask(self, step: int) -> None:
        """Start the share of a step; parameters must not change before `collect`."""
        self._pipe.send(step)

    def collect(self) -> dict[str, Metrics]:
        """Wait for the step's share and add its gradients."""
        figures: dict[str, Metrics] = self._pipe.recv()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad += gradient
        return figures

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()
