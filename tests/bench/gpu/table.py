"""Results to Markdown tables, beside the roofline.

    python tests/bench/gpu/table.py RESULTS.jsonl --checkpoint DIR

What was not measured stands as a dash. DIR gives the sizes that the roofline is counted from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.gpu.plan import SETTINGS  # noqa: E402
from bench.gpu.roofline import (  # noqa: E402
    Machine,
    Model,
    decode_step_s,
    item_s,
    model_of,
    prefill_flops,
)

TASKS = ("image-140", "image-280", "image-560", "audio-15", "audio-30", "video-32")
Line = Mapping[str, Any]
MISSING = "-"


def read(path: Path) -> dict[str, Line]:
    """The last good line of each measure."""
    lines = [json.loads(text) for text in path.read_text().splitlines() if text]
    return {line["measure"]: line for line in lines if "error" not in line}


def number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def ratio(above: float | None, below: float | None) -> str:
    return MISSING if not above or not below else f"{above / below:.2f}"


def rows_of(header: str, rows: Iterable[Iterable[str]]) -> str:
    columns = header.count("|") + 1
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"| {header} |\n|" + "---|" * columns + f"\n{body}\n"


def best_raw(lines: Mapping[str, Line], task: str) -> Line | None:
    """vLLM's own processor at its best number of threads."""
    found = [line for name, line in lines.items() if name.startswith(f"{task}/raw-")]
    return max(found, key=lambda line: float(line["items_s"]), default=None)


def items_table(lines: Mapping[str, Line], model: Model) -> str:
    """Items a second in the three forms, and how near the ceiling is to the roofline."""

    def rate(line: Line | None) -> float | None:
        """Items a second, or seconds of sound a second (hours an hour)."""
        return None if line is None else float(line["items_s"]) * (line["duration_s"] or 1.0)

    rows = []
    for task in TASKS:
        ceiling, prepared = lines.get(f"{task}/ceiling"), lines.get(f"{task}/prepared")
        raw, best = lines.get(f"{task}/raw-1"), best_raw(lines, task)
        most = floor_rate(lines, model, ceiling)
        rows.append(
            [
                task + (", hours an hour" if task.startswith("audio") else ", a second"),
                *map(number, map(rate, (ceiling, prepared, raw, best))),
                MISSING if best is None else str(best["threads"]),
                ratio(rate(prepared), rate(raw)),
                ratio(rate(prepared), rate(best)),
                ratio(rate(prepared), rate(ceiling)),
                ratio(None if ceiling is None else float(ceiling["items_s"]), most),
            ]
        )
    return rows_of(
        "task | ceiling | prepared | raw, default threads | raw, best | at threads"
        " | prepared / raw | prepared / best raw | prepared / ceiling | ceiling / roofline",
        rows,
    )


def machine_of(lines: Mapping[str, Line]) -> Machine | None:
    rates = lines.get("device/rates")
    return None if rates is None else Machine(rates["flops_s"], rates["bytes_s"])


def floor_rate(lines: Mapping[str, Line], model: Model, line: Line | None) -> float | None:
    """Items a second that the roofline allows for what `line` ran, at the sequences that ran."""
    machine = machine_of(lines)
    if machine is None or line is None or not line["running"]:
        return None
    return 1 / item_s(
        model,
        machine,
        line["prompt_tokens"],
        line["patches"],
        line["output_tokens"],
        max(1, round(line["running"])),
    )


def machine_table(lines: Mapping[str, Line]) -> str:
    """What the machine spent: CPU of both processes, GPU, KV cache."""
    rows = []
    for name, line in lines.items():
        if "items_s" in line:
            rows.append(
                [
                    name,
                    number(line["items_s"], 2),
                    number(1e3 * line["front_cpu_s_item"], 2),
                    number(1e3 * line["engine_cpu_s_item"], 2),
                    number(line.get("gpu_busy"), 2),
                    number(line.get("gpu_power_w"), 0),
                    number(line["kv_used"], 2),
                    number(line["running"], 0),
                    number(line["prefill_tokens_s"], 0),
                    number(line["decode_tokens_s"], 0),
                ]
            )
    return rows_of(
        "measure | items/s | front CPU ms an item | other processes' CPU ms | GPU busy | W"
        " | KV used | running | prompt tokens/s | answer tokens/s",
        rows,
    )


def phases_table(lines: Mapping[str, Line], model: Model) -> str:
    """Prefill and decode apart, beside what the machine allows."""
    machine = machine_of(lines)
    rows = []
    prefill, decode = lines.get("image-280/prefill"), lines.get("image-280/decode")
    if machine is not None and prefill is not None:
        flops = prefill_flops(model, prefill["prompt_tokens"], prefill["patches"])
        done = flops * prefill["items_s"]
        rows.append(
            [
                "prefill",
                f"{prefill['items_s'] * prefill['prompt_tokens']:.0f} tokens/s",
                f"{done / 1e12:.0f} TFLOP/s",
                ratio(done, machine.flops_s),
            ]
        )
    ceiling = lines.get("image-280/ceiling")
    if machine is not None and decode is not None and ceiling is not None:
        floor = decode_step_s(model, machine, decode["sequences"], ceiling["prompt_tokens"] + 72)
        rows.append(
            [
                f"decode, {decode['sequences']} sequences",
                f"{decode['decode_tokens_s']:.0f} tokens/s",
                f"{1e3 * decode['step_s']:.1f} ms a step",
                ratio(floor, decode["step_s"]),
            ]
        )
    return rows_of("phase | rate | work | of the roofline", rows)


def settings_table(lines: Mapping[str, Line]) -> str:
    """Other engines, embedders and numbers in flight beside the base."""
    base = lines.get("image-280/ceiling")
    names = [f"setting/{name}" for name in SETTINGS]
    names += [f"image-280/{name}" for name in ("batched-uint8", "batched-bf16", "loop-uint8")]
    names += ["image-280/flight-256", "image-280/flight-128"]
    rows = [
        [
            name,
            number(None if line is None else line["items_s"], 1),
            ratio(line and line["items_s"], base and base["items_s"]),
            number(line and 1e3 * line["front_cpu_s_item"], 2),
        ]
        for name in names
        for line in [lines.get(name)]
    ]
    return rows_of("image-280, ceiling | images/s | / base | front CPU ms an image", rows)


def way_table(lines: Mapping[str, Line]) -> str:
    """Files to text, and the CPU cores that one GPU needs."""
    ceiling = lines.get("image-280/ceiling")
    rows = []
    for name, line in lines.items():
        if not name.startswith("way/"):
            continue
        most = float((ceiling or line)["items_s"])
        cores = most * (line["media_cpu_s_item"] + line["front_cpu_s_item"])
        rows.append(
            [
                str(line["workers"]),
                number(line["media_alone_items_s"]),
                number(line["items_s"]),
                ratio(line["items_s"], ceiling and ceiling["items_s"]),
                number(1e3 * line["media_cpu_s_item"], 1),
                number(line["workers_busy"], 2),
                line["bottleneck"],
                number(cores, 1),
            ]
        )
    return rows_of(
        "workers | media alone, images/s | files to text, images/s | / ceiling"
        " | media CPU ms an image | workers busy | bottleneck | cores a GPU needs",
        rows,
    )


def embedder_table(lines: Mapping[str, Line]) -> str:
    line = lines.get("device/embedder")
    ways = ("copy-bf16", "copy-uint8", "loop-bf16", "batched-bf16", "loop-uint8", "batched-uint8")
    return rows_of(
        "embedder alone, 27 pictures of 264 patches | ms",
        [[way, number(line and line[way], 2)] for way in ways],
    )


def tables(lines: Mapping[str, Line], model: Model) -> str:
    about = next(iter(lines.values()), None)
    head = "nothing measured"
    if about is not None:
        versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
        gpu = about["gpu"] or "no GPU"
        head = f"{about['date']}, {gpu}, {about['cpus']} CPUs, Python {about['python']}, {versions}"
    machine = machine_of(lines)
    if machine is not None:
        head += f"; {machine.flops_s / 1e12:.0f} TFLOP/s, {machine.bytes_s / 1e12:.2f} TB/s"
    parts = [
        items_table(lines, model),
        phases_table(lines, model),
        machine_table(lines),
        settings_table(lines),
        way_table(lines),
        embedder_table(lines),
    ]
    return head + "\n\n" + "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    asked = parser.parse_args()
    config = json.loads((asked.checkpoint / "config.json").read_text())
    print(tables(read(asked.results), model_of(config)))


if __name__ == "__main__":
    main()
