"""Train the nano checkpoint: `python deploy/nano/train.py --work-dir DIR`.

Steps and seeds are fixed, batches are a function of the step, and the state is kept in the work
directory: run the same command again and it goes on where it was. Uses CUDA where it is there.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch._dynamo.config
import torch._inductor.config
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.nano import generate_speech, model, start
from deploy.nano import tokenizer as nano_tokenizer
from deploy.nano.batches import Batch, Steps
from deploy.nano.generate_speech import Recording
from deploy.nano.network import Tensors, Trainee
from deploy.nano.optimiser import ADAMW_RATE, MUON_RATE, SCHEDULE, Muon, rate, split
from deploy.nano.parallel import Metrics, Side, allocate_with_tcmalloc, run
from deploy.nano.speech_bank import Bank, load_or_record
from operators.engine import emulated_bfloat16

STEPS: Final = SCHEDULE[-1][0]
# Steps from one saved state to the next.
KEEP_EVERY: Final = 50
SEED: Final = 20
BANK_SEED: Final = 3
# 24000 takes, of which few are met twice: 4000 were learnt by heart, and held-out ones fell behind.
TAKES_PER_VOICE: Final = 60
# For each codec and bit rate.
CODED_WINDOWS: Final = 240
CHECKPOINT: Final = Path(__file__).resolve().parent / "checkpoint"

_LOG = logging.getLogger("nano.train")


def coded_windows(path: Path, bank: Bank) -> list[Recording]:
    """Return CODED_WINDOWS windows for each codec and bit rate, from `path` once made."""
    if not path.exists():
        rng = np.random.default_rng(BANK_SEED)
        kinds = list(product(generate_speech.CODECS, generate_speech.BITRATES_KBIT_S))
        drawn = (
            [generate_speech.draw_window(bank, rng) for _ in range(CODED_WINDOWS)] for _ in kinds
        )
        with ThreadPoolExecutor(2) as pool:
            coded = pool.map(generate_speech.code_together, drawn, *zip(*kinds, strict=True))
            made = [recording for together in coded for recording in together]
        torch.save(made, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    loaded: list[Recording] = torch.load(path, weights_only=False)
    return loaded


def to_device(batch: Batch, device: torch.device) -> Tensors:
    """Turn arrays into tensors on the device."""
    return {k: torch.as_tensor(v).to(device, non_blocking=True) for k, v in batch.items()}


def ready_to_draw(_: int) -> None:
    """Make a drawing process take the time that training leaves."""
    torch.set_num_threads(1)
    os.nice(10)


def build(seed: int) -> Trainee:
    """Return a fresh model with the structured start; the patch projection is frozen."""
    fresh = model.build(seed)
    start.apply(fresh)
    vocabulary = nano_tokenizer.build().get_vocab()
    start.share_word_rows(fresh.get_input_embeddings().weight, vocabulary)
    vision = fresh.model.embed_vision
    for frozen in (vision.patch_ln1, vision.patch_dense):
        frozen.requires_grad_(False)
    return Trainee(fresh)


def train(arguments: argparse.Namespace) -> None:
    """Train to the last step and write the checkpoint."""
    work: Path = arguments.work_dir
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    trainee = build(SEED).to(device)
    if arguments.compile:
        # A side process may not have children of its own.
        torch._inductor.config.compile_threads = 1
        # Six layers and a few kinds of shapes; the standard limit of 8 is for one function.
        torch._dynamo.config.recompile_limit = 64
        for layer in trainee.model.model.language_model.layers:
            layer.compile(dynamic=True)
    matrices, rest = split(trainee)
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    full_rates = [MUON_RATE, ADAMW_RATE]
    first, spent_s = 0, 0.0
    state_path = work / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        trainee.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first, spent_s = state["step"], state["spent_s"]
        _LOG.info("going on at step %d", first)

    bank = load_or_record(work / "bank.npz", BANK_SEED, TAKES_PER_VOICE)
    coded = coded_windows(work / "coded.pt", bank)
    data = Steps(SEED, bank, coded, whole=device.type != "cpu")

    def take(step: int, batches: dict[str, Batch]) -> dict[str, Metrics]:
        tensors = {name: to_device(batch, device) for name, batch in batches.items()}
        return run(trainee, tensors, data.bidirectional(step), arguments.bf16)

    # Before the loader: a forked process must not inherit its threads.
    side = None
    if device.type == "cpu":
        side = Side(trainee, data.side, take)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(first, arguments.steps),
        num_workers=arguments.workers,
        prefetch_factor=4,
        worker_init_fn=ready_to_draw,
    )
    begun = time.monotonic()
    recent: dict[str, list[float]] = {}
    for step, batches in enumerate(loader, start=first):
        share = rate(step)
        for optimiser, full_rate in zip(optimisers, full_rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = full_rate * share
        if side is not None:
            side.ask(step)
        figures = take(step, batches)
        if side is not None:
            figures |= side.collect()
        for name, metrics in figures.items():
            for key, value in metrics.items():
                recent.setdefault(f"{name}.{key}", []).append(value)
        torch.nn.utils.clip_grad_norm_(matrices + rest, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        done = step + 1
        if done % 20 == 0 or done == arguments.steps:
            line: dict[str, Any] = {k: round(float(np.mean(v)), 4) for k, v in recent.items()}
            line |= {"step": done, "seconds": round(spent_s + time.monotonic() - begun, 1)}
            recent.clear()
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            _LOG.info("%s", line)
        if done % KEEP_EVERY == 0 or done == arguments.steps:
            state = {
                "model": trainee.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "step": done,
                "spent_s": spent_s + time.monotonic() - begun,
            }
            torch.save(state, state_path.with_suffix(".partial"))
            os.replace(state_path.with_suffix(".partial"), state_path)
    if side is not None:
        side.close()
    model.save(trainee.model.cpu(), arguments.output)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=STEPS)
    # One drawing process keeps two cores busy; a GPU asks for more.
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    parser.add_argument("--workers", type=int, default=workers)
    # Three tenths of a step's time; without a C++ compiler it cannot be had.
    compiler = shutil.which("g++") is not None
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compiler)
    bf16 = torch.cuda.is_available() or not emulated_bfloat16()
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not torch.cuda.is_available():
        allocate_with_tcmalloc()
    train(arguments)


if __name__ == "__main__":
    main()
