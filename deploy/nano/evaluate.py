"""Print the held-out table: `python deploy/nano/evaluate.py`.

Exact match per modality through vLLM with prepared inputs, and whether transformers' `generate`
gives the same strings for the first ones of each, both in float32 (in bf16 the two round at different
places): under the causal mask of vLLM on CPUs, and under its own, in which the patches of a picture
see each other.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.nano import heldout
from deploy.nano.answers import Transformers, ask_engine
from deploy.nano.heldout import Example
from deploy.nano.speech_bank import load_or_record

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"


def table(examples: list[Example], answers: list[str]) -> list[str]:
    """Return lines "group right / count", modalities in total and then group by group."""
    right: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for example, answer in zip(examples, answers, strict=True):
        for key in (example.group.split()[0].upper(), example.group):
            count[key] += 1
            right[key] += answer == example.expected
    return [f"{k:38} {right[k]:5} / {count[k]:5}  {right[k] / count[k]:.3f}" for k in sorted(count)]


def main() -> None:
    """Parse the command line, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=300, help="examples per modality")
    parser.add_argument(
        "--same", type=int, default=60, help="compared with transformers, each; 0: none"
    )
    parser.add_argument("--seed", type=int, default=1_000_003)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "nano")
    parser.add_argument("--dtype", default="auto", help="of the engine: auto, float32 or bfloat16")
    parser.add_argument("--without-engine", action="store_true", help="transformers only")
    parser.add_argument("--errors", type=int, default=12, help="wrong answers to show")
    arguments = parser.parse_args()
    bank = load_or_record(
        arguments.work_dir / "bank-heldout.npz", heldout.BANK_SEED, heldout.TAKES_PER_VOICE
    )
    parts = [
        heldout.pictures(arguments.seed, arguments.count),
        heldout.windows(arguments.seed, arguments.count, bank),
        heldout.clips(arguments.seed, arguments.count),
    ]
    examples = [example for part in parts for example in part]
    if arguments.without_engine:
        model = Transformers(arguments.checkpoint)
        answers = [model.answer(example.request) for example in examples]
    else:
        requests = [example.request for example in examples]
        answers = ask_engine(arguments.checkpoint, requests, arguments.dtype)
    print("\n".join(table(examples, answers)))
    wrong = [(e, a) for e, a in zip(examples, answers, strict=True) if a != e.expected]
    for example, answer in wrong[: arguments.errors]:
        print(f"  {example.group}: expected {example.expected!r}, got {answer!r}")
    if arguments.without_engine or not arguments.same:
        return
    compared = [example for part in parts for example in part[: arguments.same]]
    requests = [example.request for example in compared]
    answers = ask_engine(arguments.checkpoint, requests, "float32")
    for name, causal in (("the mask of vLLM on CPUs", True), ("its own mask", False)):
        model = Transformers(arguments.checkpoint, causal)
        same: dict[str, list[bool]] = defaultdict(list)
        for example, answer in zip(compared, answers, strict=True):
            same[example.group.split()[0]].append(model.answer(example.request) == answer)
        for kind, equal in same.items():
            print(f"{kind}: same string from transformers under {name} {sum(equal)} / {len(equal)}")


if __name__ == "__main__":
    main()
