"""What import-linter cannot see: that the heavy imports happen late."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules_loaded_by(folders: str) -> set[str]:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in folders.split()
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    ended = subprocess.run(
        [sys.executable, "-c", script + "print(*sys.modules)", *names],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(ended.stdout.split())


def test_no_module_loads_vllm_when_imported() -> None:
    assert "vllm" not in modules_loaded_by("operators pipeline jobs")


def test_operators_do_not_load_ray() -> None:
    assert "ray" not in modules_loaded_by("operators")
