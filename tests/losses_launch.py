"""Run by test_losses_launch.py in a process without Triton's interpreter, for a stand-in GPU.

Every form of every loss is launched three times: by Triton, past its binder, and by Triton again with nothing
remembered. The second and third must run one compiled form, with the same arguments, while all other forms are
remembered too. Prints how many launches went
past the binder and how many could not, as a tensor lay off a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from qempo_fast import _backends
from qempo_fast.cli.standin import standin

Launch = tuple[str, tuple[Any, ...], dict[str, Any]]


def layout(kind: torch.dtype | None, n: int) -> dict[str, Any]:
    return {"group_size": 8} if kind is None else {"offsets": torch.arange(0, n + 1, 8, dtype=kind)}


def calls(dtype: torch.dtype, at: int, n: int) -> Iterator[Launch]:
    """(op, arguments, settings) of tensors that begin at the element `at` of their memory."""

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(at + torch.Size(shape).numel(), dtype=dtype)[at:].view(shape)

    one, two = x(n), x(n)
    family = {"alpha": 0.3, "beta": 0.1}
    for refs in ((x(n), x(n)), (None, None)):
        for smoothing, reduction in ((0.0, "mean"), (0.1, "sum"), (0.0, "none")):
            yield "pair_loss", (one, two, *refs), {**family, "label_smoothing": smoothing, "reduction": reduction}
    for kind in (None, torch.int32, torch.int64):
        groups = layout(kind, n)
        for baseline in ("loo", "none"):
            for bonus in (None, x(n)):
                yield "group_loss", (one, bonus, two), {**family, **groups, "baseline": baseline, "bonus": bonus}
        yield "variance_loss", (one, two, x(n)), {**family, **groups}
        for k in (1, 2):
            yield "rspo_loss", (one, two), {"k": k, **groups}
    for reduction in ("mean", "none"):
        yield "epa_loss", (one, x(n, 2), x(n, 0), two, x(n, 2), x(n, 0)), {"beta": 0.1, "reduction": reduction}
        yield "poft_loss", (one, two, x(n, 3)), {"reduction": reduction}
    for kind in (torch.int32, torch.int64):
        cu = layout(kind, n)["offsets"]
        token: tuple[dict[str, Any], ...] = ({}, {"ref_token_logps": x(n), "kl": 0.1}, {"ratio": "sequence"})
        for more in (*token, {"normalize": 9.0}):
            yield "token_loss", (one, two, x(n // 8), cu), more


def runner(launch: Launch) -> Callable[[], object]:
    op, args, settings = launch
    run = _backends.kernel(op, torch.device("cpu"), "triton")
    return lambda: run(*args, **settings)


def plain(args: Any) -> list[Any]:
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]


def past_the_binder(given: Any) -> bool:
    """Triton hands on the tensors themselves."""
    return not any(isinstance(x, torch.Tensor) for x in given)


class Watched:
    """The compiled forms that are remembered, and what each was run with, in order."""

    def __init__(self, forms: Any) -> None:
        self.forms, self.ran, self.known = forms, [], []

    def watch(self) -> None:
        for form in self.forms().values():
            if not any(form is other for other in self.known):
                self.known.append(form)
                form.run = lambda *given, form=form: self.ran.append((form, given))


def check(launch: Launch, watched: Watched) -> None:
    """Launches past the binder, among all forms so far, and by Triton: all tensors at multiples of 16 bytes."""
    op, run, forms = launch[0], runner(launch), watched.forms
    run()
    watched.watch()
    watched.ran.clear()
    run()
    remembered = dict(forms())
    forms.cache_clear()
    run()
    assert len(watched.ran) == 2, f"{op}: Triton takes a form that is not there"
    (form, given), (tritons, other_given) = watched.ran
    assert form is tritons, f"{op}: Triton takes another form"
    assert past_the_binder(given), op
    assert not past_the_binder(other_given), op
    forms().update(remembered)
    mine, theirs = plain(given), plain(other_given)
    # Grid, stream, function and metadata; then three of hooks; then the kernel's own.
    assert mine[:6] == theirs[:6], op
    assert len(mine) == len(theirs), op
    own, other = mine[9:], theirs[9:]
    assert [type(a) for a in own] == [type(b) for b in other], op
    # The memory of results may be another each time.
    made = {"pair_loss": 3, "epa_loss": 4}.get(op, 2)
    assert sum(a != b for a, b in zip(own, other, strict=True)) <= made, op


def check_hooks(forms: Any) -> None:
    """A profiler's hook sees every launch: Triton makes it, until the hook goes."""
    import triton

    run, seen = runner(next(calls(torch.float32, 0, 16))), []
    run()
    (found,) = forms().values()
    found.run = lambda *given: seen.append(past_the_binder(given))

    def hook(metadata: Any) -> None:
        pass

    run()
    for hooks in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hooks.add(hook)
        run()
        hooks.remove(hook)
        run()
    assert seen == [True, False, True, False, True], seen


def main() -> None:
    direct = by_triton = 0
    with standin(compiles=False):
        from qempo_fast.kernels import _loss_launch

        assert _loss_launch._DIRECT, "a version of Triton that nobody has read"
        forms = _loss_launch._forms
        watched = Watched(forms)
        for dtype in (torch.float32, torch.float64):
            for n in (16, 4096):
                for launch in calls(dtype, 0, n):
                    check(launch, watched)
                    direct += 1
                remembered = dict(forms())
                for launch in calls(dtype, 1, n):
                    watched.ran.clear()
                    runner(launch)()
                    assert not watched.ran, launch[0]
                    by_triton += 1
                assert forms() == remembered
        forms.cache_clear()
        check_hooks(forms)
    print(direct, by_triton)


if __name__ == "__main__":
    main()
