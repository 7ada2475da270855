"""The kit: what was packed is what is unpacked, and what is not whole is said."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import pytest
from bench.gpu import kit
from bench.gpu.plan import SETUPS

LEFT_OUT = "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"


def wheel(folder: Path, name: str, version: str, **members: bytes) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            info = zipfile.ZipInfo(member)
            info.external_attr = (0o755 if member.endswith("run") else 0o644) << 16
            file.writestr(info, content)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        file.writestr(f"{name}-{version}.dist-info/METADATA", about)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    # random bytes do not shrink: 3 MB fill four pieces of 1 MB
    noise = random.Random(0).randbytes(3_000_000)
    return [
        wheel(tmp_path, "vllm", "0.26.0", **{"vllm/big.so": noise, LEFT_OUT: b"x" * 100}),
        wheel(tmp_path, "msg_spec", "1.2", **{"msgspec/a.py": b"1", "bin/run": b"#!"}),
    ]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "BLOCK_BYTES", 700_000)


VERSIONS = {"vllm": "0.26.0", "msg-spec": "1.2"}


def test_what_is_packed_comes_out_and_what_is_left_out_does_not(
    tmp_path: Path, wheels: list[Path]
) -> None:
    index = kit.pack(wheels, tmp_path / "kit", VERSIONS, piece_mb=1)
    assert [piece["name"] for piece in index["pieces"]] == [f"piece-{n:02d}" for n in range(4)]
    assert all(piece["bytes"] <= 1_000_000 for piece in index["pieces"])
    assert index["left_out"] == [LEFT_OUT]
    kit.unpack(tmp_path / "kit", tmp_path / "site")
    site = tmp_path / "site"
    assert (site / "vllm/big.so").read_bytes() == random.Random(0).randbytes(3_000_000)
    assert not (site / LEFT_OUT).exists()
    assert (site / "bin/run").stat().st_mode & 0o100


def test_a_kit_that_is_not_whole_says_which_pieces(tmp_path: Path, wheels: list[Path]) -> None:
    folder = tmp_path / "kit"
    kit.pack(wheels, folder, VERSIONS, piece_mb=1)
    (folder / "piece-01").unlink()
    damaged = bytearray((folder / "piece-02").read_bytes())
    damaged[5] ^= 1
    (folder / "piece-02").write_bytes(damaged)
    with pytest.raises(kit.KitError, match="piece-01 is missing, piece-02 is damaged"):
        kit.unpack(folder, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_block_that_was_changed_with_its_pieces_hash_is_refused(
    tmp_path: Path, wheels: list[Path]
) -> None:
    folder = tmp_path / "kit"
    index = kit.pack(wheels, folder, VERSIONS, piece_mb=1)
    index["blocks"][0]["sha256"] = "0" * 64
    (folder / "kit.json").write_text(json.dumps(index))
    with pytest.raises(kit.KitError, match="piece-00 at 0: not the bytes that were packed"):
        kit.unpack(folder, tmp_path / "site")


def test_a_package_of_another_version_is_refused(tmp_path: Path, wheels: list[Path]) -> None:
    kit.pack(wheels, tmp_path / "kit", VERSIONS | {"msg-spec": "1.3"}, piece_mb=1)
    with pytest.raises(kit.KitError, match=r"msg-spec should be 1.3, is \['1.2'\]"):
        kit.unpack(tmp_path / "kit", tmp_path / "site")


def test_a_member_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    bad = wheel(tmp_path, "bad", "1", **{"../out.py": b"1"})
    kit.pack([bad], tmp_path / "kit", {"bad": "1"}, piece_mb=1)
    with pytest.raises(Exception, match="outside the destination"):
        kit.unpack(tmp_path / "kit", tmp_path / "site")
    assert not (tmp_path / "out.py").exists()


def test_a_folder_that_holds_something_is_not_packed_over(
    tmp_path: Path, wheels: list[Path]
) -> None:
    kit.pack(wheels, tmp_path / "kit", VERSIONS, piece_mb=1)
    with pytest.raises(kit.KitError, match="is not empty"):
        kit.pack(wheels, tmp_path / "kit", VERSIONS, piece_mb=1)


def test_the_kit_has_what_vllm_imports_before_any_quantisation() -> None:
    # get_quantization_config imports every method's module, and those compressed-tensors and loguru
    assert SETUPS["fp8"].extra["quantization"] == "fp8"
    assert {"compressed-tensors", "loguru"} <= set(kit.pins(kit.REQUIREMENTS))


def test_what_compiles_at_run_time_for_other_formats_stays_behind() -> None:
    assert kit.is_left_out("vllm/third_party/deep_gemm/include/cute/arch/copy.hpp")
    assert kit.is_left_out("vllm/third_party/deep_gemm/_C.cpython-312-x86_64-linux-gnu.so")
    # FlashAttention 2 is left out, so that 3 must stay: vLLM's own package wants one of them
    assert not kit.is_left_out("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")


def test_every_line_of_the_list_is_pinned(tmp_path: Path) -> None:
    assert kit.pins(kit.REQUIREMENTS)["vllm"] == "0.26.0"
    loose = tmp_path / "loose.txt"
    loose.write_text("numpy>=2  # no\n")
    with pytest.raises(kit.KitError, match="must be name==version; got 'numpy>=2'"):
        kit.pins(loose)
