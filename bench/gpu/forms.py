"""Fills Triton's cache with every form that the runs on a GPU launch, where there is no GPU; kit.py starts it.

    python -P bench/gpu/forms.py [part ...]            kernels, headline, shapes, dpp, losses, checks, counters, search
    QEMPO_STANDIN=1 python -P -m pytest -p gpu.forms TESTS

TRITON_CACHE_DIR gets them. FORMS_USED gets, a file for each process, the keys that were asked for and those that were
built. Kernels go to the stand-in driver; what Triton builds beside each on a GPU, a C module of its arguments, is built
too: with gcc that takes as long as half of the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu.standin import as_on_a_gpu, no_products, wide_products


class Used:
    """Keys of Triton's cache that were asked for, and those of them that were not in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: set[str] = set()

    def note(self, name: str, key: str) -> None:
        if (name, key) not in self.asked:
            self.asked.add((name, key))
            with (self.folder / f"{name}-{os.getpid()}").open("a") as file:
                file.write(key + "\n")


def _no_library(folder: str) -> None:
    """An empty libcuda.so.1: a C module is linked with it here and loaded with the driver's on a GPU."""
    words = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
    subprocess.run(words, check=True)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Within it the stand-in driver also builds the C modules, keys are noted, and GEMMs are those of a GPU."""
    import triton.runtime.build as build
    import triton.runtime.cache as cache
    from triton.backends.nvidia import driver as nvidia

    from qempo_fast.cli import standin

    used = Used(Path(os.environ["FORMS_USED"]))

    class Driver(standin._Driver):
        def __init__(self, target: Any, launches: Any) -> None:
            super().__init__(target, launches)

            class Launcher(self.launcher_cls):  # type: ignore[misc,name-defined]
                def __init__(self, src: Any, metadata: Any) -> None:
                    super().__init__(src, metadata)
                    nvidia.CudaLauncher(src, metadata)

            self.launcher_cls = Launcher

    begin, put = cache.FileCacheManager.__init__, cache.FileCacheManager.put

    def asked(self: Any, key: str, *args: Any, **more: Any) -> None:
        begin(self, key, *args, **more)
        used.note("asked", key)

    def made(self: Any, *args: Any, **more: Any) -> str:
        used.note("built", self.key)
        return str(put(self, *args, **more))

    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (standin, "_Driver", Driver), (cache.FileCacheManager, "__init__", asked),
            (cache.FileCacheManager, "put", made), (build, "_load_module_from_path", lambda name, path: mock.Mock()),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(target, name, value))
        patches.enter_context(wide_products())
        # Of the products only their types matter.
        patches.enter_context(no_products(torch.zeros))
        folder = patches.enter_context(tempfile.TemporaryDirectory(prefix="qempo-libcuda-"))
        _no_library(folder)
        patches.enter_context(mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder))
        nvidia.CudaUtils()
        yield


_open = contextlib.ExitStack()


def pytest_configure() -> None:
    _open.enter_context(building())


def pytest_unconfigure() -> None:
    _open.close()


def kernels() -> None:
    from gpu.sanitize import OPS

    for op, checks in OPS.items():
        for name, run in checks(torch.device("cpu"), "triton"):
            _attempt(f"{op}: {name}", run)


def _zeros(case: Any) -> Any:
    from suite.logps import Inputs

    dtype = getattr(torch, case.dtype)
    hidden, weight = torch.zeros(case.n, case.d, dtype=dtype), torch.zeros(case.v, case.d, dtype=dtype)
    return Inputs(hidden, weight, torch.arange(case.n) % case.v, torch.ones(case.n))


def cases(title: str) -> None:
    """What gpu/cases.py times, by its own providers."""
    from gpu.cases import groups
    from suite.logps import unchecked

    group = groups(False)[title]
    for case in group.cases:
        for name in (n for n in group.providers if n.startswith("qempo_fast") and not n.endswith("cuda")):
            if group.op == "logps":
                _attempt(f"{case}, {name}", lambda n=name, c=case: unchecked(n, c, _zeros(c))[1].run())
            else:
                _attempt(f"{case}, {name}", lambda n=name, c=case: _step(group.op, n, c))
        if group.op == "logps":
            _attempt(f"{case}, forward alone", lambda c=case: _forward_alone(c))


def _step(op: str, name: str, case: Any) -> None:
    """Of DPP or a loss, whose providers for a GPU take no CPU tensors."""
    from suite.ops import load

    module = load(op)
    made, function = module.inputs(case, "cpu"), module.PROVIDERS[name].make(case, "cuda")
    if op == "dpp":
        leaves = {"x": made.embeddings.detach().requires_grad_()}
        out = function(leaves["x"])
    else:
        leaves = {key: made.tensors[key].detach().requires_grad_() for key in module.LOSSES[case.loss][1].split()}
        out = function(made.tensors | leaves)
    torch.autograd.grad(out, list(leaves.values()), made.incoming)


def _forward_alone(case: Any) -> None:
    import qempo_fast as qf

    made = _zeros(case)
    with torch.no_grad():
        # gpu/cases.py does both: times it, and asks the entropy once.
        for entropy in (False, True):
            more = {} if entropy else {"grad": "exact"}
            qf.linear_logps(made.hidden, made.weight, made.targets, softcap=case.softcap, entropy=entropy, **more)


def checks() -> None:
    from gpu.checks import ops, results

    for name, (function, args) in ops("cpu").items():
        _attempt(name, lambda f=function, a=args: results(f, a))


def counters() -> None:
    from gpu import hot_kernels

    with mock.patch.object(sys, "argv", ["hot_kernels", "--device", "cpu"]):
        _attempt("hot kernels", hot_kernels.main)


def search() -> None:
    """The candidates that the second call searches, each built once."""
    import qempo_fast as qf
    from gpu.cases import GEMMA, GPU, SMOLLM2
    from gpu.second import MODES
    from qempo_fast.kernels import _launch

    def one(case: Any, how: dict[str, Any]) -> None:
        made = _zeros(case)
        leaves = [x.requires_grad_() for x in (made.hidden, made.weight)]
        out = qf.linear_logps(*leaves, made.targets, softcap=case.softcap, **how).logps
        torch.autograd.grad(out, leaves, made.incoming.to(out.dtype))

    def once(run: Callable[[], None]) -> float:
        with contextlib.suppress(Exception):  # a candidate for a device with more shared memory
            run()
        return 1.0

    with (
        mock.patch.object(_launch, "AUTOTUNE", True),
        mock.patch.object(_launch, "_milliseconds", once),
        mock.patch.object(torch.cuda, "get_device_name", return_value="no GPU"),
    ):
        for case in (GPU, GEMMA, SMOLLM2):
            for how in MODES.values():
                _attempt(f"search, {case}", lambda c=case, h=how: one(c, h))


def _attempt(name: str, run: Callable[[], object]) -> None:
    """Results are garbage here, and a comparison may say so: all that it was to launch has been launched by then."""
    from triton.compiler.errors import CompilationError

    try:
        run()
        print(f"ran  {name}", flush=True)
    except (ArithmeticError, ValueError, AssertionError) as error:
        print(f"ran  {name}, wrong numbers: {str(error).splitlines()[0][:100] if str(error) else error!r}", flush=True)
    except CompilationError:
        raise
    except Exception as error:
        traceback.print_exc()
        print(f"FAIL {name}: {error}", flush=True)
        _failed.append(name)


_failed: list[str] = []
PARTS: dict[str, Callable[[], None]] = {
    "kernels": kernels,
    **{title: (lambda t=title: cases(t)) for title in ("headline", "shapes", "dpp", "losses")},
    "checks": checks,
    "counters": counters,
    "search": search,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all without")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}")
    with building(), as_on_a_gpu():
        for part in chosen:
            PARTS[part]()
    if _failed:
        sys.exit(f"gpu/forms: {len(_failed)} did not launch: {', '.join(_failed)}")


if __name__ == "__main__":
    main()
