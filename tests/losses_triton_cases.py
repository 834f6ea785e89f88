"""What the Triton kernels of the losses are tried on; each case makes its tensors in float64 when a test draws it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Drawn = tuple[list[torch.Tensor | None], dict[str, Any]]
# In the interpreter a program takes 64 elements, RSPO's 32: the cases above that run in several.


def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64) + shift


def offsets(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])


def pairs(n: int, scale: float = 3.0, refs: bool = True, **settings: Any) -> Callable[[], Drawn]:
    def make() -> Drawn:
        given: list[torch.Tensor | None] = [draw(n, scale=scale, shift=-20) for _ in range(4)]
        return given if refs else [*given[:2], None, None], {"alpha": 0.3, "beta": 0.1, **settings}

    return make


def groups(layout: Any, scale: float = 3.0, rewards: Any = None, extra: bool = False, **settings: Any) -> Any:
    """layout: (groups, size) or offsets; extra: a bonus for the online loss."""

    def make() -> Drawn:
        ragged = isinstance(layout, torch.Tensor)
        n = int(layout[-1]) if ragged else math.prod(layout)
        keywords = {"offsets": layout} if ragged else {"group_size": layout[1]}
        r = draw(n) if rewards is None else rewards(n)
        bonus = {"bonus": draw(n)} if extra else {}
        return [draw(n, scale=scale, shift=-20), draw(n, scale=scale, shift=-20), r], {
            **{"alpha": 0.3, "beta": 0.1, **settings},
            **keywords,
            **bonus,
        }

    return make


def without_reference(make: Callable[[], Drawn]) -> Callable[[], Drawn]:
    def made() -> Drawn:
        (logps, _, rewards), settings = make()
        return [logps, None, rewards], settings

    return made


def risk(layout: Any, rewards: Any = None, **settings: Any) -> Callable[[], Drawn]:
    def make() -> Drawn:
        (logps, _, r), keywords = groups(layout, rewards=rewards, **settings)()
        return [logps, r], {name: x for name, x in keywords.items() if name not in ("alpha", "beta")}

    return make


def negatives(n: int, strong: int, weak: int, scale: float = 3.0, **settings: Any) -> Callable[[], Drawn]:
    def make() -> Drawn:
        shapes = [(n,), (n, strong), (n, weak)] * 2
        return [draw(*shape, scale=scale) for shape in shapes], {"beta": 1.0, **settings}

    return make


def blocked() -> Drawn:
    """Log-probs of minus infinity: a strong negative that cannot happen beside a weak one that can."""
    given, settings = negatives(5, 70, 2)()
    given[1][1:3] = -math.inf
    return given, settings


def means(n: int, models: int, scale: float = 3.0, **settings: Any) -> Callable[[], Drawn]:
    def make() -> Drawn:
        lengths = torch.randint(1, 30, (n,)).double()
        return [draw(n, scale=scale), lengths, draw(n, models, shift=-2)], settings

    return make


def tokens(sizes: tuple[int, ...], kl: float = 0.0, spread: float = 0.3, **settings: Any) -> Callable[[], Drawn]:
    def make() -> Drawn:
        n = sum(sizes)
        logps, advantages = draw(n, scale=0.5, shift=-2), draw(len(sizes)).abs()
        advantages[::2] *= -1
        advantages[len(sizes) // 2] = 0 if len(sizes) > 1 else -1
        keywords = {"ref_token_logps": logps + draw(n)} if kl else {}
        return [logps, logps + draw(n, scale=spread), advantages, offsets(*sizes)], {"kl": kl, **keywords, **settings}

    return make


def overflowing() -> Drawn:
    """Ratios of e^1000 and e^-1000, clipped and not, and an advantage of 0."""
    new = torch.tensor([1000.0, -1000.0, -1000.0, 1000.0, 1000.0, 0.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    return [new, torch.zeros_like(new), advantages, offsets(1, 1, 1, 3)], {}


class Case(NamedTuple):
    op: str
    why: str
    make: Callable[[], Drawn]
    # What of its numbers the reference's own float64 gets no better than a kernel's.
    hard: bool = False
    # The one that stands for its op where one is enough: several programs, the last not full.
    typical: bool = False


RAGGED = offsets(2, 5, 131, *[4] * 12, 3)
EMPTY = (0, 3, 0, 0, 7, 60, 70, 1, 0)
CASES = [
    Case("pair_loss", "one pair", pairs(1)),
    Case("pair_loss", "21 programs, the last not full", pairs(1300), typical=True),
    Case("pair_loss", "no reference, sum", pairs(37, refs=False, reduction="sum")),
    Case("pair_loss", "label smoothing, each pair", pairs(100, label_smoothing=0.1, reduction="none")),
    Case("pair_loss", "scores of 1e5: saturated on both sides", pairs(100, 1e5, label_smoothing=0.2)),
    Case("pair_loss", "beta of 1e-4 on scores of 1e5", pairs(100, 1e5, alpha=1e-4, beta=1e-4)),
    Case("pair_loss", "losses down to e^-80", pairs(100, 40.0, alpha=1.0, reduction="none")),
    Case("group_loss", "odd size, several programs", groups((20, 7))),
    Case("group_loss", "k = 2", groups((3, 2)), typical=True),
    Case("group_loss", "groups larger than a block", groups((2, 200), baseline="mean")),
    Case("group_loss", "ragged, one larger than a block, with a bonus", groups(RAGGED, extra=True)),
    Case("group_loss", "one group, int32 offsets", groups(offsets(100).int(), baseline="mean")),
    Case("group_loss", "groups of one, no baseline", groups((70, 1), baseline="none")),
    Case("group_loss", "no reference, no baseline, ragged", without_reference(groups(RAGGED, baseline="none"))),
    Case("group_loss", "log-probs of 1e5, rewards of 1e-8", groups((9, 8), 1e5, lambda n: draw(n, scale=1e-8))),
    Case(
        "group_loss",
        "rewards of 1e8 a few apart",
        groups((9, 8), rewards=lambda n: draw(n, scale=30, shift=1e8)),
        hard=True,
    ),
    Case("group_loss", "alpha and beta of 1e-4", groups((9, 8), 1e5, alpha=1e-4, beta=1e-4)),
    Case("variance_loss", "odd size, several programs", groups((20, 7)), typical=True),
    Case("variance_loss", "ragged, one larger than a block", groups(RAGGED)),
    Case("variance_loss", "one group of two, no reference", without_reference(groups((1, 2)))),
    Case("variance_loss", "log-probs of 1e5, rewards of 1e8", groups((9, 8), 1e5, lambda n: draw(n, scale=1e8))),
    Case("epa_loss", "one strong, no weak negative", negatives(70, 1, 0)),
    Case("epa_loss", "more weak ones than a block, no strong", negatives(9, 0, 70, reduction="sum")),
    Case("epa_loss", "more strong ones than a block, each row", negatives(3, 130, 2, reduction="none")),
    Case("epa_loss", "margins near 0", negatives(37, 2, 5, 1e-3), typical=True),
    Case("epa_loss", "log-probs of 1e5", negatives(37, 2, 5, 1e5)),
    Case("epa_loss", "losses down to e^-80", negatives(37, 1, 1, 40.0, reduction="none")),
    Case("epa_loss", "a block of log-probs of -inf", blocked),
    Case("poft_loss", "one model", means(1, 1)),
    Case("poft_loss", "three models, margin, several programs", means(150, 3, beta=1.3, gamma=0.2), typical=True),
    Case("poft_loss", "log-probs of 1e5, each row", means(40, 2, 1e5, reduction="none")),
    Case("rspo_loss", "k = 2, odd size, several programs", risk((9, 5), k=2), typical=True),
    Case("rspo_loss", "k = n", risk((3, 6), k=6)),
    Case("rspo_loss", "k = 1: rewards with a baseline", risk((9, 5), k=1)),
    Case("rspo_loss", "k = 1, ragged, none", risk(RAGGED, k=1, baseline="none")),
    Case("rspo_loss", "ties, in rewards of 0 and 1", risk((8, 16), lambda n: (draw(n) > 0).double(), k=4)),
    Case("rspo_loss", "all rewards equal", risk((2, 16), lambda n: torch.full((n,), 0.7), k=4)),
    Case("rspo_loss", "ragged, two wider than the tile", risk(offsets(3, 20, *[4] * 12, 17, 3), k=3)),
    Case("rspo_loss", "n = 1000: binomials of 1e299", risk((1, 1000), k=500)),
    Case(
        "rspo_loss", "rewards of 1e8 a few apart", risk((4, 8), lambda n: draw(n, scale=30, shift=1e8), k=3), hard=True
    ),
    Case("rspo_loss", "rewards of 1e-8 below 0", risk((4, 8), lambda n: draw(n, scale=1e-9, shift=-1e-8), k=3)),
    Case("token_loss", "one token", tokens((1,))),
    Case("token_loss", "empty sequences, first, twice and last", tokens(EMPTY)),
    Case(
        "token_loss",
        "empty sequences, KL, over tokens",
        tokens(EMPTY, 0.1, normalize="token", eps_high=0.28),
        typical=True,
    ),
    Case("token_loss", "a long sequence cut over programs", tokens((700,), 0.05)),
    Case(
        "token_loss", "more sequences than a power of two, T_max", tokens(tuple(i % 5 for i in range(100)), normalize=9)
    ),
    Case("token_loss", "GSPO", tokens(EMPTY, ratio="sequence", eps_low=0.01, eps_high=0.02)),
    Case("token_loss", "GSPO over tokens with KL", tokens((300, 5, 90), 0.1, ratio="sequence", normalize="token")),
    Case("token_loss", "nothing clipped: ratios of 1", tokens((50, 40), spread=0.0)),
    Case("token_loss", "far from the reference: e^d to e^30", tokens((50, 40), 0.1, spread=10.0)),
    Case("token_loss", "ratios of e^1000, clipped and with no advantage", overflowing),
]

TYPICAL = {case.op: case for case in CASES if case.typical}
