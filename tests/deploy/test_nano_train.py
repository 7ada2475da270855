"""Training goes on where it was interrupted, and compiles."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy.nano import generate_speech, speech_bank

TRAIN = Path(__file__).resolve().parents[2] / "deploy" / "nano" / "train.py"


def start(work: Path, steps: int, *, compiled: bool = False) -> subprocess.Popen[bytes]:
    """Train to step number `steps`, with a small bank in place of the real one."""
    work.mkdir(exist_ok=True)
    if not (work / "bank.npz").exists():
        bank = speech_bank.load_or_record(work / "bank.npz", seed=3, per_voice=1)
        rng = np.random.default_rng(0)
        coded = [generate_speech.draw_window(bank, rng, max_words=3) for _ in range(4)]
        torch.save(coded, work / "coded.pt")
    command = [sys.executable, str(TRAIN), "--work-dir", str(work)]
    command.append("--compile" if compiled else "--no-compile")
    return subprocess.Popen([*command, "--output", str(work / "made"), "--steps", str(steps)])


def test_what_was_interrupted_is_what_was_not(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = start(whole, 2)
    assert start(parts, 1).wait(240) == 0
    first = load_file(parts / "made" / "model.safetensors")
    assert start(parts, 2).wait(240) == 0
    assert straight.wait(240) == 0
    assert len((parts / "log.jsonl").read_text().splitlines()) == 2
    once, twice = (load_file(work / "made" / "model.safetensors") for work in (whole, parts))
    assert once.keys() == twice.keys()
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name
    # the second step did something
    assert any(not torch.equal(tensor, twice[name]) for name, tensor in first.items())


def test_compiled_layers_do_what_the_others_do(tmp_path: Path) -> None:
    """One step has shapes enough for a layer to be compiled more than once."""
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    slow, fast = start(plain, 1), start(compiled, 1, compiled=True)
    assert slow.wait(240) == 0
    assert fast.wait(400) == 0
    ours, theirs = (json.loads((work / "log.jsonl").read_text()) for work in (plain, compiled))
    for key in ("pictures", "clips", "large", "windows"):
        assert theirs[f"{key}.answer"] == pytest.approx(ours[f"{key}.answer"], rel=1e-2), key


def test_the_second_process_ends_with_a_trainer_that_is_killed() -> None:
    """Nobody would notice the one that stays: it holds a core's share of memory, and the output."""
    program = (
        "import os, signal, torch\n"
        "from deploy.nano.parallel import Side\n"
        "side = Side(torch.nn.Linear(2, 2), lambda step: {}, lambda step, share: {'step': step})\n"
        "side.ask(4)\n"
        "print(side.collect(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # ends when the last process that holds this output has ended
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == b"{'step': 4}\n"
    assert ended.stderr == b""
