"""What travels to a machine with a GPU and no package index: wheels, Triton's cache, Liger's native head.

    python -P bench/gpu/kit.py build [--peer liger]     what `make gpu-kit` runs; into .gpu/
    python -P bench/gpu/kit.py check                    status 1 where the sources have changed since; names what has
    python -P bench/gpu/kit.py unpack FOLDER            Triton's cache into FOLDER, which TRITON_CACHE_DIR is to name

Nothing here imports torch: check and unpack run before the wheels are installed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suite.provenance import ROOT, commit

BENCH = ROOT / "bench"

# The machine's own; Triton's keys hold for one version of it.
TORCH, TRITON, PYTHON = "2.11.0", "3.6.0", "3.12"
# What nvcc is asked for, and what its fatbin then says.
ARCHITECTURE, CODE = "90a-real", "sm_90a"
# Those that constraints-cpu.txt pins have its versions; trl 1.16.0 imports with transformers 5.17.0 too.
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "datasets", "multiprocess", "dill")
_PINNED = {"multiprocess": "0.70.19", "dill": "0.4.1"}
PLATFORMS = tuple(f"manylinux{n}_x86_64" for n in ("_2_35", "_2_28", "_2_27", "_2_24", "_2_17", "2014"))
# What the environment of the kit needs to build the wheel and to run the tests.
_TOOLS = (
    "cmake", "ninja", "pybind11>=3,<4", "setuptools>=77", "wheel", "numpy", "mpmath", "packaging", "pytest",
    "pytest-timeout", "pytest-xdist", "pyyaml", "rich", "typer",
)  # fmt: skip
# Sources by what a change in them makes stale.
SOURCES = {
    "triton": ("kernels/*.py",),
    "wheel": ("kernels/*.py", "qempo_fast/**/*.py", "csrc/**/*", "CMakeLists.txt", "setup.py", "pyproject.toml"),
}
MIB = 2**20
# In place of the cache's own folder in what Triton wrote.
_HERE = "@cache@"


class KitError(RuntimeError):
    """Why there is no kit; one line."""


def digest(root: Path, patterns: Iterable[str]) -> str:
    """Of names and contents of the files, whatever folder they lie in."""
    files = sorted({p for pattern in patterns for p in root.glob(pattern) if p.is_file()})
    whole = hashlib.sha256()
    for path in files:
        if path.suffix not in (".so", ".pyc"):
            whole.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def stale(kit: Path, root: Path = ROOT) -> list[str]:
    """What of the kit was built from other sources than root's; all of it where there is no kit.json."""
    try:
        recorded = json.loads((kit / "kit.json").read_text())["sources"]
    except (OSError, ValueError, KeyError):
        return list(SOURCES)
    return [part for part, patterns in SOURCES.items() if recorded.get(part) != digest(root, patterns)]


def check(kit: Path, root: Path = ROOT) -> int:
    if not (kit / "kit.json").is_file():
        print(f"gpu/kit: no kit.json in {kit}; make gpu-kit builds it")
        return 1
    old = stale(kit, root)
    why = {
        "triton": "kernels/ has changed since the kit: Triton's keys have line numbers in them, and it would compile",
        "wheel": "the library has changed since the kit: its wheel holds the old one",
    }
    for part in old:
        print(f"gpu/kit: {why[part]}; make gpu-kit")
    return 1 if old else 0


# Triton's cache


def pack(cache: Path, keys: Iterable[str], out: Path) -> int:
    """Of these entries of a cache what a launch needs: machine code, C modules and what describes them; how many."""
    count = 0
    with tarfile.open(out, "w:xz", preset=6) as tar:
        for key in sorted(set(keys)):
            for path in sorted((cache / key).glob("*")) if (cache / key).is_dir() else ():
                if path.suffix not in (".cubin", ".json", ".so"):
                    continue
                content = path.read_bytes()
                if path.name.startswith("__grp__"):
                    content = json.dumps({"child_paths": _children(content)}).encode()
                about = tarfile.TarInfo(f"{key}/{path.name}")
                about.size, about.mode = len(content), 0o644
                tar.addfile(about, io.BytesIO(content))
                count += path.suffix == ".cubin"
    return count


def _children(group: bytes) -> dict[str, str]:
    """Triton 3.6 writes absolute paths into a group and looks there: elsewhere each would be a miss."""
    paths = json.loads(group)["child_paths"]
    return {
        name: f"{_HERE}/{Path(path).parent.name}/{name}"
        for name, path in paths.items()
        if Path(name).suffix in (".cubin", ".json")
    }


def unpack(archive: Path, folder: Path) -> int:
    """What pack made, as a cache that lies in folder; the number of entries."""
    folder = folder.resolve()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            content = tar.extractfile(member)
            if content is None or len(Path(member.name).parts) != 2 or ".." in member.name:
                raise KitError(f"{archive}: no part of a cache: {member.name}")
            data = content.read()
            path = folder / member.name
            if path.name.startswith("__grp__"):
                data = data.replace(_HERE.encode(), str(folder).encode())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return len({Path(m.name).parts[0] for m in members})


def keys(used: Path, kind: str) -> set[str]:
    return {line for path in used.glob(f"{kind}-*") for line in path.read_text().split()}


# Building


def run(words: Sequence[str | Path], passes: Sequence[int] = (0,), **env: str) -> str:
    """A program's output; KitError with the end of it where it ends with another status."""
    environment = {k: v for k, v in {**os.environ, **env}.items() if v}
    done = subprocess.run(
        [str(w) for w in words], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode not in passes:
        raise KitError(f"{' '.join(map(str, words[:6]))} ...: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def python(name: str) -> Path:
    """The Python 3.12 that the wheels are for."""
    found = shutil.which(name)
    version = ""
    if found:
        words = [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        version = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    if found is None or version != PYTHON:
        raise KitError(f"KIT_PYTHON: wanted Python {PYTHON}, {name} is {version or 'not there'}")
    return Path(found)


def environment(venv: Path, name: str) -> Path:
    """The Python of an environment with torch and Triton of the GPU's machine, made where there is none."""
    inside = venv / "bin" / "python"
    if not inside.exists():
        print(f"making {venv}: torch {TORCH} is some gigabytes", flush=True)
        run([python(name), "-m", "venv", venv])
        run([inside, "-m", "pip", "install", "-q", f"torch=={TORCH}", f"triton=={TRITON}", *_TOOLS])
    words = "import torch, triton, sys; print(torch.__version__, triton.__version__, '%d.%d' % sys.version_info[:2])"
    versions = run([inside, "-P", "-c", words]).split()[-3:]
    versions[0] = versions[0].split("+")[0]
    if versions != [TORCH, TRITON, PYTHON]:
        raise KitError(f"KIT_VENV: wanted torch {TORCH}, triton {TRITON}, Python {PYTHON}, {venv} has {versions}")
    return inside


def own_wheel(inside: Path, wheels: Path, kept: Path) -> Path:
    """Built into the folder kept, which is of these sources, unless it is there; its copy in wheels."""
    if not list(kept.glob("qempo_fast-*.whl")):
        path = f"{inside.parent}{os.pathsep}{os.environ['PATH']}"
        with tempfile.TemporaryDirectory(prefix="qempo-wheel-") as work:
            words = [inside, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", work, ROOT]
            run(words, PATH=path, QEMPO_CUDA="1", CUDAARCHS=ARCHITECTURE)
            (built,) = Path(work).glob("qempo_fast-*.whl")
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, kept)
    (wheel,) = kept.glob("qempo_fast-*.whl")
    return Path(shutil.copy(wheel, wheels))


_SYMTAB = 2


def section_types(elf: bytes) -> list[int]:
    """Of a 64-bit little-endian ELF file; those of the machine code for the GPU, which lies inside, are its own."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    return [struct.unpack_from("<I", elf, start + i * size + 4)[0] for i in range(count)]


def check_native(inside: Path, site: Path) -> None:
    """The installed module has CUDA kernels for the one card, no symbol table, and nothing else that is large."""
    (module,) = (site / "qempo_fast").glob("_C.*.so")
    tools = "import triton, pathlib; print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump')"
    dump = run([run([inside, "-P", "-c", tools]).strip(), "-all", "--dump-elf", module])
    found = sorted(set(re.findall(r"^arch = (\S+)", dump, re.MULTILINE)))
    if found != [CODE]:
        raise KitError(f"{module.name}: wanted machine code for {CODE} alone, found {found}")
    if _SYMTAB in section_types(module.read_bytes()):
        raise KitError(f"{module.name}: it is not stripped")
    words = "from qempo_fast import _C; print(_C.dpp_cuda_fwd, _C.dpp_cuda_bwd, _C.dpp_cuda_select)"
    run([inside, "-P", "-c", words], PYTHONPATH=str(site))


def pins(constraints: str) -> dict[str, str]:
    """name -> version of the peers."""
    lines = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in constraints.splitlines())
    pinned = {m[1].lower(): m[2] for m in lines if m} | _PINNED
    return {name: pinned[name] for name in PEERS}


def peer_wheels(inside: Path, wheels: Path) -> dict[str, str]:
    versions = pins((ROOT / "constraints-cpu.txt").read_text())
    download(inside, wheels, [f"{name}=={version}" for name, version in versions.items()])
    return versions


def download(inside: Path, folder: Path, requirements: Sequence[str]) -> None:
    words = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    platforms = [word for p in PLATFORMS for word in ("--platform", p)]
    run([inside, "-m", "pip", "download", "-q", *words, *platforms, "-d", folder, *requirements])


def install(inside: Path, wheels: Iterable[Path], site: Path) -> None:
    options = ("-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    run([inside, "-m", "pip", "install", *options, *map(str, wheels)])


def forms(inside: Path, site: Path, cache: Path, used: Path, tests: bool) -> None:
    """The benchmarks' launches and, where asked, the GPU test files', under the stand-in driver."""
    used.mkdir(parents=True, exist_ok=True)
    env = {
        "PYTHONPATH": f"{site}{os.pathsep}{BENCH}", "PYTHONSAFEPATH": "1", "TRITON_CACHE_DIR": str(cache),
        "FORMS_USED": str(used), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    run([inside, "-P", BENCH / "gpu" / "forms.py"], **env)
    if tests:
        options = ("-n", str(os.cpu_count() or 1), "-p", "gpu.forms", "-q", "--tb=short", "--timeout=900")
        words = [inside, "-P", "-m", "pytest", *options, "-p", "no:cacheprovider", *selection()]
        # A failed test is `make standin`'s to tell; its kernels up to there are built.
        print(run(words, passes=(0, 1), QEMPO_STANDIN="1", **env).strip().splitlines()[-1], flush=True)


def selection() -> list[str]:
    """pytest's words for the tests that the first call on a GPU runs."""
    code = "from gpu.first import selection; print('\\n'.join(selection(False)))"
    return run([sys.executable, "-P", "-c", code], PYTHONPATH=str(BENCH)).strip().splitlines()


def triton_cache(inside: Path, kit: Path, wheel: Path, cache: Path) -> dict[str, int]:
    """kit/triton.tar.xz, and whether another folder with another install of the wheel finds all of it there."""
    with tempfile.TemporaryDirectory(prefix="qempo-kit-") as name:
        work = Path(name)
        install(inside, [wheel], work / "site")
        check_native(inside, work / "site")
        forms(inside, work / "site", cache, work / "used", tests=True)
        asked = keys(work / "used", "asked")
        count = pack(cache, asked, kit / "triton.tar.xz")
        unpack(kit / "triton.tar.xz", work / "elsewhere")
        install(inside, [wheel], work / "other" / "site")
        forms(inside, work / "other" / "site", work / "elsewhere", work / "again", tests=True)
        missed = keys(work / "again", "built")
        if missed:
            raise KitError(f"the packed cache missed {len(missed)} of {len(keys(work / 'again', 'asked'))} entries")
    return {"entries": len(asked), "kernels": count}


# The whole


def sizes(kit: Path) -> dict[str, int]:
    """Bytes of each part that travels."""
    parts = {"own wheel": "wheels/qempo_fast-*.whl", "Triton's cache": "triton.tar.xz", "Liger native": "native/*"}
    found = {name: sum(p.stat().st_size for p in kit.glob(pattern)) for name, pattern in parts.items()}
    every = sum(p.stat().st_size for p in kit.glob("wheels/*.whl"))
    found["peers' wheels"] = every - found["own wheel"]
    return {name: n for name, n in found.items() if n}


def table(found: dict[str, int]) -> list[str]:
    rows = [*found.items(), ("in all", sum(found.values()))]
    return [f"{name:16} {n / MIB:7.2f} MiB" for name, n in rows]


def refuse_large(kit: Path, most: float) -> dict[str, int]:
    """Its sizes; KitError past so many MiB."""
    found = sizes(kit)
    total = sum(found.values()) / MIB
    if total > most:
        raise KitError(f"the kit is {total:.1f} MiB, more than {most:g} may travel: {', '.join(table(found))}")
    return found


def record(kit: Path, found: dict[str, int], sources: dict[str, str], **more: Any) -> None:
    content = {
        "date": datetime.date.today().isoformat(), "sources": sources, "bytes": found,
        "python": PYTHON, "torch": TORCH, "triton": TRITON, **more,
    }  # fmt: skip
    (kit / "kit.json").write_text(json.dumps(content, indent=1) + "\n")


def cuda(inside: Path) -> str:
    words = ("nvcc", "--version")
    return next(iter(re.findall(r"release (\S+),", run(words))), "unknown")


def build(kit: Path, name: str, venv: Path, peer: str, most: float, cached: bool = True) -> None:
    start = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {what}", flush=True)

    inside = environment(venv, name)
    shutil.rmtree(kit / "wheels", ignore_errors=True)
    (kit / "wheels").mkdir(parents=True)
    (kit / "kit.json").unlink(missing_ok=True)
    # Before anything is built: an edit made meanwhile leaves a kit that is told to be old.
    sources, of = {part: digest(ROOT, patterns) for part, patterns in SOURCES.items()}, commit(ROOT)
    wheel = own_wheel(inside, kit / "wheels", venv / "qempo-wheels" / sources["wheel"][:16])
    told(f"wheel, {wheel.stat().st_size / MIB:.2f} MiB")
    versions = peer_wheels(inside, kit / "wheels")
    told("peers: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    if peer != "liger":
        shutil.rmtree(kit / "native", ignore_errors=True)
    else:
        from suite import liger_native

        versions |= liger_native.fetch(kit / "native", lambda folder, words: download(inside, folder, words))
        told("Liger's native head")
    if cached:
        entries = triton_cache(inside, kit, wheel, venv / "qempo-triton-cache")
        told(f"Triton's cache: {entries['kernels']} kernels, all found again in another folder")
    else:
        (kit / "triton.tar.xz").unlink(missing_ok=True)
        entries = {"entries": 0, "kernels": 0}
    found = refuse_large(kit, most)
    record(kit, found, sources, commit=of, cuda=cuda(inside), versions=versions, triton_cache=entries)
    print("\n".join(table(found)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "check", "unpack"))
    parser.add_argument("folder", nargs="?", type=Path, help="of unpack")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--python", default="python3.12", help="a Python 3.12")
    parser.add_argument("--venv", type=Path, help="its environment, kept between builds; default in the user's cache")
    parser.add_argument("--peer", default="", choices=("", "liger"))
    parser.add_argument("--no-cache", action="store_true", help="without Triton's: kernels compile at the other end")
    parser.add_argument("--most", type=float, default=60, help="MiB")
    args = parser.parse_args()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        if args.what == "check":
            return check(args.kit)
        if args.what == "unpack":
            if args.folder is None:
                parser.error("unpack: wanted a folder")
            archive = args.kit / "triton.tar.xz"
            if archive.is_file():
                print(f"{unpack(archive, args.folder)} entries of Triton's cache")
            else:
                print("no cache of Triton's in this kit: kernels compile here")
            return 0
        venv = args.venv or home / "qempo_fast" / "gpu-kit"
        build(args.kit, args.python, venv, args.peer, args.most, not args.no_cache)
    except KitError as error:
        print(f"gpu/kit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
