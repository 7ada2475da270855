"""The kit: what a bare GPU machine without a network needs to run this benchmark, in hashed pieces.

    python tests/bench/gpu/kit.py pack KIT [--piece-mb 50]     here: fetch, leave out, compress, cut
    python tests/bench/gpu/kit.py check KIT                    anywhere: which pieces are whole?
    python tests/bench/gpu/kit.py unpack KIT SITE              there: check, unpack, compare versions

KIT holds kit.json and piece-00, piece-01, ...: a tar of all packages, cut into blocks that are each
compressed with xz and hashed, so that 16 cores unpack them at once. Carry the pieces in any order and
in as many steps as it takes; `check` names what is missing. `unpack` ends with the line that puts SITE in
front of PYTHONPATH. A second kit goes into a SITE of its own: what is there, vLLM uses at every start.
Only the standard library is used on the other side.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PYTHON = "3.12"
# pip takes a platform tag literally: every glibc that a wheel of the list may name
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + [
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")
]
# What is carried for nothing, with what it takes compressed.
LEFT_OUT = (
    # 123 MB: FlashAttention 2. Hopper has 3, and head sizes of 256 and 512 in one model take Triton.
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    # 40 MB: mixture-of-experts kernels; vLLM does without them, and the 12B is dense.
    "vllm/_moe_C_stable_libtorch.abi3.so",
    # 12 MB: the server in Rust, which nobody starts.
    "vllm/vllm-rs",
    # DeepGEMM, which compiles at run time and serves FP8 in blocks: without it vLLM asks for none;
    # Blackwell's attention
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
)
BLOCK_BYTES = 8 << 20
PIECE_MB = 50


class KitError(Exception):
    """A kit that is not whole, or not the one that was asked for."""


def fetch(requirements: Path, folder: Path) -> list[Path]:
    """Download the wheels of `requirements` into `folder` with pip, without their dependencies."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"),
            *("--abi", f"cp{PYTHON.replace('.', '')}", "--abi", "abi3", "--abi", "none"),
            *(*platforms, "--dest", str(folder), "--requirement", str(requirements)),
        ],
        check=True,
    )
    return sorted(folder.glob("*.whl"))


def pins(requirements: Path) -> dict[str, str]:
    """Version by name. Raises KitError for a line that is not `name==version`."""
    found = {}
    for line in requirements.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, equals, version = text.partition("==")
        if not equals:
            raise KitError(f"{requirements.name}: must be name==version; got {text!r}")
        found[name] = version
    return found


def is_left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def tar_of(wheels: Iterable[Path], stream: io.BufferedIOBase) -> list[str]:
    """Write one uncompressed tar of all members that go along. Returns what was left out."""
    left_out = []
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as members:
                for member in sorted(members.infolist(), key=lambda info: info.filename):
                    if member.is_dir():
                        continue
                    if is_left_out(member.filename):
                        left_out.append(member.filename)
                        continue
                    entry = tarfile.TarInfo(member.filename)
                    entry.size = member.file_size
                    entry.mode = 0o755 if (member.external_attr >> 16) & 0o100 else 0o644
                    with members.open(member) as content:
                        tar.addfile(entry, content)
    return left_out


def pack(wheels: list[Path], kit: Path, versions: dict[str, str], piece_mb: int) -> dict[str, Any]:
    """Write pieces and kit.json. Returns the latter. Raises KitError where `kit` holds one already."""
    kit.mkdir(parents=True, exist_ok=True)
    if any(kit.iterdir()):
        raise KitError(f"{kit}: is not empty; give a new folder")
    limit = piece_mb * 1_000_000
    pieces: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as tar, ProcessPoolExecutor() as pool:
        left_out = tar_of(wheels, tar)
        tar.seek(0)
        raw = iter(lambda: tar.read(BLOCK_BYTES), b"")
        piece = None
        for digest, packed in pool.map(_compress, raw):
            if len(packed) > limit:
                raise KitError(f"a block takes {len(packed)} bytes: --piece-mb is too small")
            if piece is None or piece["bytes"] + len(packed) > limit:
                piece = {"name": f"piece-{len(pieces):02d}", "bytes": 0}
                pieces.append(piece)
            blocks.append(
                {
                    "piece": piece["name"],
                    "offset": piece["bytes"],
                    "bytes": len(packed),
                    "sha256": digest,
                }
            )
            with open(kit / piece["name"], "ab") as file:
                file.write(packed)
            piece["bytes"] += len(packed)
    for piece in pieces:
        piece["sha256"] = hashlib.sha256((kit / piece["name"]).read_bytes()).hexdigest()
    index = {
        "python": PYTHON,
        "versions": versions,
        "left_out": left_out,
        "pieces": pieces,
        "blocks": blocks,
    }
    (kit / "kit.json").write_text(json.dumps(index, indent=1) + "\n")
    return index


def _compress(raw: bytes) -> tuple[str, bytes]:
    return hashlib.sha256(raw).hexdigest(), lzma.compress(raw, preset=6)


def check(kit: Path) -> dict[str, Any]:
    """kit.json of a whole kit. Raises KitError that names every missing or damaged piece."""
    index: dict[str, Any] = json.loads((kit / "kit.json").read_text())
    bad = []
    for piece in index["pieces"]:
        path = kit / piece["name"]
        if not path.exists():
            bad.append(f"{path.name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != piece["sha256"]:
            bad.append(f"{path.name} is damaged ({path.stat().st_size} of {piece['bytes']} bytes)")
    if bad:
        raise KitError(f"{kit}: " + ", ".join(bad))
    return index


def unpack(kit: Path, site: Path) -> dict[str, Any]:
    """Check, unpack into `site`, and compare the packages there with the list. Raises KitError."""
    index = check(kit)
    site.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        work = [(str(kit), block) for block in index["blocks"]]
        with tarfile.open(fileobj=_Joined(pool.map(_expand, work)), mode="r|") as tar:
            tar.extractall(site, filter="data")
    compare(site, index["versions"])
    return index


def _expand(work: tuple[str, dict[str, Any]]) -> bytes:
    kit, block = work
    with open(os.path.join(kit, block["piece"]), "rb") as file:
        file.seek(block["offset"])
        raw = lzma.decompress(file.read(block["bytes"]))
    if hashlib.sha256(raw).hexdigest() != block["sha256"]:
        raise KitError(f"{block['piece']} at {block['offset']}: not the bytes that were packed")
    return raw


class _Joined(io.RawIOBase):
    """A readable stream over blocks that come one after the other."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        parts = []
        while size > 0:
            if not self._rest:
                self._rest = memoryview(next(self._blocks, b""))
                if not self._rest:
                    break
            parts.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        return b"".join(parts)


def compare(site: Path, versions: dict[str, str]) -> None:
    """Raises KitError where a package in `site` is absent or not the version of the list."""
    wrong = []
    for name, version in versions.items():
        found = [
            each.version
            for each in metadata.distributions(path=[str(site)])
            if _plain(each.metadata["Name"]) == _plain(name)
        ]
        if found != [version]:
            wrong.append(f"{name} should be {version}, is {found}")
    if wrong:
        raise KitError(f"{site}: " + ", ".join(wrong))


def search_path(site: Path) -> list[Path]:
    """`site`, and in it the folder that CuTe DSL names in a .pth file, which PYTHONPATH does not read."""
    return [site, *sorted(site.glob("nvidia_cutlass_dsl/dsl_packages"))]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("kit", type=Path)
    packing.add_argument("--requirements", type=Path, default=REQUIREMENTS)
    packing.add_argument("--wheels", type=Path, help="keep the downloads here")
    packing.add_argument("--piece-mb", type=int, default=PIECE_MB, help="10^6 bytes, at most")
    checking = commands.add_parser("check")
    checking.add_argument("kit", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("kit", type=Path)
    unpacking.add_argument("site", type=Path)
    asked = parser.parse_args()
    try:
        if asked.command == "pack":
            with tempfile.TemporaryDirectory() as folder:
                wheels = fetch(asked.requirements, asked.wheels or Path(folder))
                index = pack(wheels, asked.kit, pins(asked.requirements), asked.piece_mb)
        elif asked.command == "check":
            index = check(asked.kit)
        else:
            index = unpack(asked.kit, asked.site)
    except (KitError, FileNotFoundError) as error:
        sys.exit(f"kit: {error}")
    total = sum(piece["bytes"] for piece in index["pieces"])
    for piece in index["pieces"]:
        print(f"{piece['name']}  {piece['bytes'] / 1e6:6.1f} MB  {piece['sha256'][:16]}")
    if asked.command == "unpack":
        paths = ":".join(str(path.resolve()) for path in search_path(asked.site))
        print(f"export PYTHONPATH={paths}")
    print(
        f"{len(index['versions'])} packages, {len(index['blocks'])} blocks, {total / 1e6:.1f} MB in"
        f" {len(index['pieces'])} pieces; left out: {len(index['left_out'])} files"
    )


if __name__ == "__main__":
    main()
