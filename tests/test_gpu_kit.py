"""The kit for a machine with a GPU: what it packs, what it refuses, and that it notices other sources."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_modules import BENCH, ROOT, load


@pytest.fixture(scope="module")
def kit_module() -> ModuleType:
    return load("gpu.kit")


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return load("suite.liger_native")


def _cache(folder: Path, key: str, name: str) -> None:
    """An entry of Triton's cache as 3.6 writes it, absolute paths and all that a launch does not read."""
    entry = folder / key
    entry.mkdir(parents=True)
    files = {f"{name}.{suffix}": suffix.encode() for suffix in ("cubin", "json", "ttir", "llir", "ptx", "source")}
    for file, content in files.items():
        (entry / file).write_bytes(content)
    group = {"child_paths": {file: str(entry / file) for file in files}}
    (entry / f"__grp__{name}.json").write_text(json.dumps(group))


def test_pack_keeps_what_a_launch_needs_of_the_keys_named(kit_module: ModuleType, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for key in ("AAA", "BBB", "CCC"):
        _cache(cache, key, "_some_kernel")
    (cache / "DDD").mkdir()
    (cache / "DDD" / "__triton_launcher.cpython-312-x86_64-linux-gnu.so").write_bytes(b"module")
    (cache / "DDD" / "lock").write_bytes(b"")
    # A key that was asked for and never written is no error: Triton asks before it looks.
    assert kit_module.pack(cache, ["AAA", "CCC", "DDD", "EEE"], tmp_path / "triton.tar.xz") == 2
    with tarfile.open(tmp_path / "triton.tar.xz") as tar:
        names = sorted(tar.getnames())
    kept = [f"{key}/{name}" for key in ("AAA", "CCC") for name in ("__grp__", "cubin", "json")]
    assert len(names) == len(kept) + 1
    assert {Path(n).suffix for n in names} == {".cubin", ".json", ".so"}
    assert {n.split("/")[0] for n in names} == {"AAA", "CCC", "DDD"}


def test_an_unpacked_cache_names_its_own_files(kit_module: ModuleType, tmp_path: Path) -> None:
    """Triton 3.6 looks where the group says, not beside it."""
    _cache(tmp_path / "cache", "AAA", "_some_kernel")
    kit_module.pack(tmp_path / "cache", ["AAA"], tmp_path / "triton.tar.xz")
    there = tmp_path / "elsewhere"
    assert kit_module.unpack(tmp_path / "triton.tar.xz", there) == 1
    group = json.loads((there / "AAA" / "__grp___some_kernel.json").read_text())["child_paths"]
    assert set(group) == {"_some_kernel.cubin", "_some_kernel.json"}
    for name, path in group.items():
        assert Path(path) == there / "AAA" / name
        assert Path(path).read_bytes() == name.split(".")[1].encode()


def test_unpack_writes_nowhere_else(kit_module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "bad.tgz", "w:gz") as tar:
        tar.add(tmp_path / "file", "../outside/file")
    with pytest.raises(kit_module.KitError, match="no part of a cache"):
        kit_module.unpack(tmp_path / "bad.tgz", tmp_path / "cache")
    assert not (tmp_path / "outside").exists()


def _sources(root: Path) -> None:
    for name in ("kernels/a.py", "qempo_fast/logps/b.py", "csrc/cuda/c.cu", "setup.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


def _kit(kit_module: ModuleType, root: Path, kit: Path) -> None:
    (kit / "wheels").mkdir(parents=True)
    sources = {part: kit_module.digest(root, patterns) for part, patterns in kit_module.SOURCES.items()}
    kit_module.record(kit, {"own wheel": 1}, sources, commit=kit_module.commit(ROOT), cuda="13.0")


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("kernels/a.py", ["triton", "wheel"]),
        ("kernels/new.py", ["triton", "wheel"]),
        ("qempo_fast/logps/b.py", ["wheel"]),
        ("csrc/cuda/c.cu", ["wheel"]),
        ("csrc/module.so", []),
        ("README.md", []),
    ],
)
def test_check_names_what_was_built_from_other_sources(
    kit_module: ModuleType, tmp_path: Path, changed: str, stale: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, kit = tmp_path / "root", tmp_path / "kit"
    _sources(root)
    _kit(kit_module, root, kit)
    assert kit_module.check(kit, root) == 0
    assert capsys.readouterr().out == ""
    with (root / changed).open("a") as file:
        file.write("# a line more\n")
    assert kit_module.stale(kit, root) == stale
    assert kit_module.check(kit, root) == bool(stale)
    assert len(capsys.readouterr().out.splitlines()) == len(stale)


def test_the_same_sources_elsewhere_are_the_same(kit_module: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _sources(tmp_path / name)
    for patterns in kit_module.SOURCES.values():
        assert kit_module.digest(tmp_path / "one", patterns) == kit_module.digest(tmp_path / "two", patterns)


def test_every_kernel_is_among_the_sources(kit_module: ModuleType, tmp_path: Path) -> None:
    """A pattern that matches nothing would leave the check blind."""
    for part, patterns in kit_module.SOURCES.items():
        for pattern in patterns:
            assert list(ROOT.glob(pattern)), (part, pattern)


def test_without_a_kit_all_of_it_is_missing(
    kit_module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kit_module.check(tmp_path) == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_kit_json_says_what_it_is_of(kit_module: ModuleType, tmp_path: Path) -> None:
    _sources(tmp_path / "root")
    _kit(kit_module, tmp_path / "root", tmp_path / "kit")
    content = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert {"commit", "date", "sources", "bytes", "python", "torch", "triton", "cuda"} <= set(content)
    assert (content["python"], content["torch"], content["triton"]) == ("3.12", "2.11.0", "3.6.0")
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}( with changes)?", content["commit"])
    assert all(re.fullmatch(r"[0-9a-f]{64}", x) for x in content["sources"].values())


def test_a_kit_too_large_to_travel_is_refused(kit_module: ModuleType, tmp_path: Path) -> None:
    for name, size in (("wheels/qempo_fast-1-cp312.whl", 3), ("wheels/trl-1.whl", 1), ("triton.tar.xz", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size * 2**20))
    found = kit_module.refuse_large(tmp_path, 6)
    assert {name: n // 2**20 for name, n in found.items()} == {"own wheel": 3, "peers' wheels": 1, "Triton's cache": 2}
    assert kit_module.table(found)[-1].split() == ["in", "all", "6.00", "MiB"]
    with pytest.raises(kit_module.KitError, match=r"6\.0 MiB, more than 5\.9 may travel.*own wheel"):
        kit_module.refuse_large(tmp_path, 5.9)


def _run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(BENCH / "gpu" / "kit.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def test_no_python_of_that_version_is_one_clear_line(tmp_path: Path) -> None:
    for name, version in (("nosuchpython", "not there"), (str(_fake(tmp_path, "3.9")), "3.9")):
        words = ("--python", name, "--venv", str(tmp_path / "venv"), "--kit", str(tmp_path / "kit"))
        done = _run("build", *words)
        assert done.returncode == 1
        assert done.stderr == f"gpu/kit: KIT_PYTHON: wanted Python 3.12, {name} is {version}\n"
        assert not (tmp_path / "kit").exists()


def _fake(folder: Path, version: str) -> Path:
    path = folder / "python-of-another-version"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_an_environment_with_another_torch_is_refused(kit_module: ModuleType, tmp_path: Path) -> None:
    inside = tmp_path / "venv" / "bin" / "python"
    inside.parent.mkdir(parents=True)
    inside.write_text("#!/bin/sh\necho 2.13.0 3.9.0 3.12\n")
    inside.chmod(0o755)
    with pytest.raises(kit_module.KitError, match=r"KIT_VENV: wanted torch 2\.11\.0, triton 3\.6\.0.*2\.13\.0"):
        kit_module.environment(tmp_path / "venv", "python3.12")


def test_peers_have_the_versions_of_the_constraints(kit_module: ModuleType) -> None:
    pinned = kit_module.pins("trl==9.1\nLiger-Kernel==2.0\ncut-cross-entropy==3.0\ndatasets==4.0\n# trl==1\n")
    assert pinned["trl"] == "9.1"
    assert pinned["liger-kernel"] == "2.0"
    assert set(pinned) == {"trl", "liger-kernel", "cut-cross-entropy", "datasets", "multiprocess", "dill"}
    with pytest.raises(KeyError):
        kit_module.pins("trl==9.1\n")
    assert set(kit_module.pins((ROOT / "constraints-cpu.txt").read_text())) == set(kit_module.PEERS)


def test_keys_are_those_of_every_process(kit_module: ModuleType, tmp_path: Path) -> None:
    for name, lines in (("asked-1", "A\nB\n"), ("asked-22", "B\nC\n"), ("built-1", "B\n")):
        (tmp_path / name).write_text(lines)
    assert kit_module.keys(tmp_path, "asked") == {"A", "B", "C"}
    assert kit_module.keys(tmp_path, "built") == {"B"}


def test_liger_native_says_what_is_missing(native: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no liger_native\.tar\.xz in .*PEER=liger"):
        native.load(tmp_path)
    with tarfile.open(tmp_path / native.ARCHIVE, "w:xz") as tar:
        tar.add(__file__, "liger_cute_kernels/libcudart.so.12")
    with pytest.raises(RuntimeError, match=r"has no .*libliger_cute_kernels_sm90a\.so.*libnvshmem_host\.so\.3"):
        native.load(tmp_path)


def test_liger_native_takes_the_hopper_core_and_no_more(native: ModuleType, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    held: dict[str, list[str]] = {
        "liger_cute_kernels-1": [
            "libliger_cute_kernels_sm90a.so",
            "libliger_cute_kernels_sm100f.so",
            "a.cubin",
            "a.py",
        ],
        "apache_tvm_ffi-1": ["core.so", "lib/libtvm_ffi.so", "lib/libtvm_ffi_testing.so", "a.py", "include/a.h"],
        "nvidia_cuda_runtime_cu12-1": ["lib/libcudart.so.12", "lib/libcudart_static.a"],
        "nvidia_nvshmem_cu12-1": ["lib/libnvshmem_host.so.3", "lib/nvshmem_bootstrap_uid.so.3", "lib/a.bc"],
    }
    tops = {"liger_cute_kernels-1": "liger_cute_kernels/", "apache_tvm_ffi-1": "tvm_ffi/"}
    for wheel, names in held.items():
        with zipfile.ZipFile(wheels / f"{wheel}-py3-none-any.whl", "w") as archive:
            for name in names:
                archive.writestr(tops.get(wheel, "nvidia/x/") + name, name)

    def download(folder: Path, requirements: Any) -> None:
        assert len(requirements) == len(held)
        assert all("==" in r for r in requirements)
        folder.mkdir()
        for path in wheels.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    native.fetch(tmp_path / "native", download)
    with tarfile.open(tmp_path / "native" / native.ARCHIVE) as tar:
        names = set(tar.getnames())
    package = ("libliger_cute_kernels_sm90a.so", "a.py", *native._LIBRARIES)
    assert names == {f"liger_cute_kernels/{n}" for n in package} | {
        *("tvm_ffi/core.so", "tvm_ffi/lib/libtvm_ffi.so", "tvm_ffi/lib/libtvm_ffi_testing.so", "tvm_ffi/a.py"),
    }  # fmt: skip


def _fatbin(cards: list[int], size: int) -> bytes:
    """As nvcc writes one: a head, then for each GPU an entry of head and machine code."""
    heads = [struct.pack("<HHIQ12xI", 2, 0x101, 64, size, card) + b"h" * 32 for card in cards]
    entries = b"".join(head + bytes([card]) * size for head, card in zip(heads, cards, strict=True))
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_liger_native_leaves_out_other_cards_code(native: ModuleType) -> None:
    parts = [b"text", _fatbin([70, 80, 90, 100], 24), b"\0" * 8, _fatbin([90], 40), _fatbin([120], 16), b"end"]
    library = bytearray(b"".join(parts))
    assert native.hopper_alone(library) == 3 * 24 + 16
    assert len(library) == sum(map(len, parts))
    for card, size in ((70, 24), (80, 24), (100, 24), (120, 16)):
        assert bytes([card]) * size not in library, card
    assert library.count(bytes([90]) * 24) == 2
    assert library.count(b"h" * 32) == 6
    assert library.startswith(b"text")
    assert library.endswith(b"end")
    again = bytes(library)
    assert native.hopper_alone(library) == 88
    assert bytes(library) == again
    with pytest.raises(RuntimeError, match="is no fatbin"):
        native.hopper_alone(bytearray(_fatbin([90], 40)[:-8]))


def test_liger_native_is_published_with_an_address(native: ModuleType) -> None:
    assert 45 <= native.PUBLISHED["full_ms"] <= 50
    assert native.PUBLISHED["address"].startswith("https://github.com/linkedin/Liger-Kernel/")
    assert native.PUBLISHED["forward_ms"] + native.PUBLISHED["backward_ms"] == pytest.approx(45.8)
