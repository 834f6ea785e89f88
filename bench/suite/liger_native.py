"""Liger's native Hopper head, the fastest peer published: packed for a GPU without an index, and called on one rank.

It is a wheel of its own, liger-cute-kernels, with machine code for several GPUs and for a mixture of experts; the
Hopper core alone travels. It needs NVSHMEM's host library of just its version, the runtime of CUDA 12, and TVM's FFI.
`make gpu-kit PEER=liger` fetches and packs these; nothing of them is in this repository.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Logps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Of 8192 x 4096 x 131072 in bfloat16 on one H200 SXM, by its authors; the sum of a backward published at that shape and
# a forward at the rate published for twice the vocabulary.
PUBLISHED = {
    "full_ms": 45.8,
    "forward_ms": 11.2,
    "backward_ms": 34.6,
    "card": "H200 SXM",
    "address": "https://github.com/linkedin/Liger-Kernel/pull/1422",
}
ARCHIVE = "liger_native.tar.xz"
VERSIONS = {
    "liger-cute-kernels": "0.8.5",
    "apache-tvm-ffi": "0.1.15.post2",
    "nvidia-cuda-runtime-cu12": "12.9.79",
    "nvidia-nvshmem-cu12": "3.6.5",
}
# What is taken of each wheel, and the folder it goes to; the package looks for NVSHMEM beside itself first.
_CORE = "liger_cute_kernels/libliger_cute_kernels_sm90a.so"
_LIBRARIES = ("libcudart.so.12", "libnvshmem_host.so.3", "nvshmem_bootstrap_uid.so.3")
_TAKEN: dict[str, Callable[[str], bool]] = {
    "liger_cute_kernels": lambda n: n == _CORE or (n.startswith("liger_cute_kernels/") and n.endswith(".py")),
    # Its testing library too: the module of its core is linked with it.
    "apache_tvm_ffi": lambda n: n.startswith("tvm_ffi/") and n.endswith((".py", ".so")),
    "nvidia_cuda_runtime_cu12": lambda n: Path(n).name in _LIBRARIES,
    "nvidia_nvshmem_cu12": lambda n: Path(n).name in _LIBRARIES,
}
# Head of a container of machine code: its magic number and version.
_FATBIN = b"\x50\xed\x55\xba\x01\x00"
# Only itself to talk to. The conversion of tensors that TVM would compile at first use saves microseconds.
_ENVIRONMENT = {
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
}
_unpacked: dict[Path, Path] = {}


def fetch(out: Path, download: Callable[[Path, Sequence[str]], None]) -> dict[str, str]:
    """The archive in out, of wheels that download(folder, requirements) brings, unless it is there; the versions."""
    made = out / "versions.json"
    if made.is_file() and json.loads(made.read_text()) == VERSIONS and (out / ARCHIVE).is_file():
        return VERSIONS
    with tempfile.TemporaryDirectory(prefix="qempo-liger-") as name:
        wheels, tree = Path(name) / "wheels", Path(name) / "tree"
        download(wheels, [f"{package}=={version}" for package, version in VERSIONS.items()])
        take(wheels, tree)
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / ARCHIVE, "w:xz", preset=6) as tar:
            for path in sorted(p for p in tree.rglob("*") if p.is_file()):
                tar.add(path, str(path.relative_to(tree)))
    made.write_text(json.dumps(VERSIONS))
    return VERSIONS


def hopper_alone(library: bytearray) -> int:
    """Zeros in place of what the library holds for other GPUs, which packs to nothing; the bytes so changed.

    NVSHMEM's host library is 156 MiB, of which all but 2 are machine code for six GPUs. The driver reads the entries of
    the card that is there; entries keep their headers, so that the others are still passed over.
    """
    changed, at = 0, library.find(_FATBIN)
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", library, at + 4)
        entry, end = at + header, at + header + size
        if end > len(library):
            raise RuntimeError(f"Liger's native head: a fatbin of {size} bytes at {at} is no fatbin")
        while entry < end:
            own, length = struct.unpack_from("<IQ", library, entry + 4)
            (card,) = struct.unpack_from("<I", library, entry + 28)
            if card != 90:
                library[entry + own : entry + own + length] = bytes(length)
                changed += length
            entry += own + length
        at = library.find(_FATBIN, end)
    return changed


def take(wheels: Path, tree: Path) -> None:
    """What a call needs of each wheel, into tree."""
    for prefix, wanted in _TAKEN.items():
        (wheel,) = wheels.glob(f"{prefix}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not wanted(name):
                    continue
                library = Path(name).name in _LIBRARIES
                path = tree / ("liger_cute_kernels/" + Path(name).name if library else name)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = bytearray(archive.read(name))
                if path.name == "libnvshmem_host.so.3":
                    hopper_alone(content)
                path.write_bytes(content)


def unpack(folder: Path) -> Path:
    """Folder of the archive's content, unpacked once in a process."""
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise RuntimeError(f"Liger's native head: no {ARCHIVE} in {folder}; make gpu-kit PEER=liger packs it")
    if archive not in _unpacked:
        tree = Path(tempfile.mkdtemp(prefix="qempo-liger-"))
        atexit.register(shutil.rmtree, tree, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(tree, filter="data")
        missing = [n for n in (_CORE, *(f"liger_cute_kernels/{x}" for x in _LIBRARIES)) if not (tree / n).is_file()]
        if missing:
            raise RuntimeError(f"Liger's native head: {archive} has no {', '.join(missing)}")
        _unpacked[archive] = tree
    return _unpacked[archive]


@contextlib.contextmanager
def _reason(step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RuntimeError(f"Liger's native head: {step}: {type(error).__name__}: {first}") from error


def library_of(symbol: str) -> str:
    """File that a library loaded now takes this symbol from; "" where no other has made it global."""
    function = getattr(ctypes.CDLL(None), symbol, None)
    address = ctypes.cast(function, ctypes.c_void_p).value if function else None
    for line in Path("/proc/self/maps").read_text().splitlines() if address else ():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[-1]
    return ""


def _libraries(tree: Path) -> None:
    """By path and for all, in the order in which they need each other."""
    package = tree / "liger_cute_kernels"
    with _reason("its libraries do not load"):
        for name in _LIBRARIES:
            ctypes.CDLL(str(package / name), mode=ctypes.RTLD_GLOBAL)
        import tvm_ffi  # noqa: F401

    # torch brings an NVSHMEM of its own, 3.4.5 in torch 2.11, which stays out of the core's sight unless it is global.
    found = library_of("nvshmemx_get_uniqueid")
    if not found.startswith(str(tree)):
        raise RuntimeError(f"Liger's native head: its core would take another NVSHMEM than its own: {found}")
    with _reason("its core does not load"):
        ctypes.CDLL(str(tree / _CORE))


def load(folder: Path, tokens: int = 8192, hidden: int = 4096, vocabulary: int = 131072) -> Logps:
    """(hidden (N, D), weight (V, D), targets (N)) -> (N,) log-probs, with autograd; bfloat16 on a Hopper GPU.

    Its workspace is reserved once for the sizes given, which calls must not pass. RuntimeError says why it cannot run.
    """
    tree = unpack(folder)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if str(tree) not in sys.path:
        sys.path.insert(0, str(tree))
    _libraries(tree)
    with _reason("it does not start"):
        public, group = _started(tokens, hidden, vocabulary)

    def logps(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -public.apply(h, w, t, group)

    return logps


def _started(tokens: int, hidden: int, vocabulary: int) -> tuple[Any, Any]:
    """Its public autograd function, and the process group of this one process."""
    import torch.distributed as dist
    from liger_cute_kernels import tvm_ffi as core
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure
    from liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp import is_available
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyTPFunction

    core._load_module()
    # Without this the public function falls back to chunks of 512 tokens in plain torch, and says nothing.
    if not is_available():
        raise RuntimeError("the package says that its core is not available")
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    if not configure(flsce=FusedLinearCrossEntropyConfig(tokens, hidden, vocabulary)):
        raise RuntimeError("its configure() refused this device")
    return LigerFusedLinearScaledCrossEntropyTPFunction, dist.group.WORLD
