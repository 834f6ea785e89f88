"""Bad calls of the losses: (id, make, error, message); make() gives (function, args, keywords)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qempo_fast import losses

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Row = tuple[str, Callable[[], Call], type[Exception], str]

NAN, INF = float("nan"), float("inf")


def z(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def bad(at: int, value: float, n: int = 4) -> torch.Tensor:
    x = z(n)
    x[at] = value
    return x


def call(fn: Callable[..., Any], *args: Any, **kw: Any) -> Callable[[], Call]:
    """The tensors in args and kw are cloned at each call, so that rows share nothing."""

    def fresh(x: Any) -> Any:
        return x.clone() if isinstance(x, torch.Tensor) else x

    return lambda: (fn, tuple(fresh(x) for x in args), {k: fresh(x) for k, x in kw.items()})


P2, P4 = (z(4), z(4)), (z(4), z(4), z(4), z(4))
G = {"group_size": 2}
EPA = (z(4), z(4, 2), z(4, 1), z(4), z(4, 2), z(4, 1))
TOKENS = (z(6), z(6), z(2), torch.tensor([0, 2, 6]))
DQO = (z(4), z(4), torch.ones(4, 3))

ROWS: list[Row] = [
    # pairs
    (
        "dpo: not a tensor",
        call(losses.dpo_loss, [0.0], *P4[1:]),
        TypeError,
        "chosen: wanted a tensor, got list",
    ),
    ("dpo: int log-probs", call(losses.dpo_loss, z(4).long(), *P4[1:]), TypeError, "chosen: wanted float16"),
    ("dpo: 2-D", call(losses.dpo_loss, z(2, 2), *P4[1:]), ValueError, "chosen: wanted 1 dim"),
    (
        "dpo: lengths differ",
        call(losses.dpo_loss, z(4), z(3), z(4), z(4)),
        ValueError,
        r"rejected: wanted shape \(4\)",
    ),
    (
        "dpo: no reference",
        call(losses.dpo_loss, *P2, None, z(4)),
        ValueError,
        "ref_chosen: wanted the reference",
    ),
    ("dpo: beta = 0", call(losses.dpo_loss, *P4, beta=0.0), ValueError, "beta: wanted"),
    (
        "dpo: beta a tensor",
        call(losses.dpo_loss, *P4, beta=torch.tensor(0.1)),
        TypeError,
        "beta: wanted a number",
    ),
    ("dpo: reduction", call(losses.dpo_loss, *P4, reduction="avg"), ValueError, "reduction: wanted 'mean'"),
    (
        "dpo: smoothing",
        call(losses.dpo_loss, *P4, label_smoothing=0.5),
        ValueError,
        "label_smoothing: wanted",
    ),
    ("spl pair: alpha < 0", call(losses.spl_pair_loss, *P4, alpha=-1.0), ValueError, "alpha: wanted"),
    ("spl pair: beta < 0", call(losses.spl_pair_loss, *P4, alpha=1.0, beta=-0.1), ValueError, "beta: wanted"),
    ("hdpo: alpha NaN", call(losses.hdpo_loss, *P4, alpha=NAN), ValueError, "alpha: wanted"),
    ("qempo pair: lam = 0", call(losses.qempo_pair_loss, *P2, lam=0.0), ValueError, "lam: wanted"),
    ("qempo pair: lam inf", call(losses.qempo_pair_loss, *P2, lam=INF), ValueError, "lam: wanted"),
    (
        "qempo kl pair: mu < 0",
        call(losses.qempo_kl_pair_loss, *P4, lam=1.0, mu=-1.0),
        ValueError,
        "mu: wanted",
    ),
    (
        "qempo kl pair: no reference",
        call(losses.qempo_kl_pair_loss, *P2, None, None, lam=1.0, mu=1.0),
        ValueError,
        "ref_chosen: wanted the reference's log-probs, since mu > 0",
    ),
    # EPA and PoFT
    ("epa: strong 1-D", call(losses.epa_loss, z(4), z(4), *EPA[2:]), ValueError, "strong: wanted shape"),
    (
        "epa: ref_weak",
        call(losses.epa_loss, *EPA[:5], z(4, 2)),
        ValueError,
        r"ref_weak: wanted shape \(4, 1\)",
    ),
    (
        "epa: no negatives",
        call(losses.epa_loss, z(4), z(4, 0), z(4, 0), z(4), z(4, 0), z(4, 0)),
        ValueError,
        "strong: wanted at least one",
    ),
    (
        "epa: weak None",
        call(losses.epa_loss, z(4), z(4, 2), None, *EPA[3:]),
        TypeError,
        "weak: wanted a tensor",
    ),
    (
        "poft: length 0",
        call(losses.poft_loss, z(4), z(4), z(4, 2)),
        ValueError,
        "lengths: wanted lengths above 0",
    ),
    (
        "poft: no model",
        call(losses.poft_loss, z(4), z(4) + 1, z(4, 0)),
        ValueError,
        "aligned_mean_logps: wanted",
    ),
    (
        "poft: aligned NaN",
        call(losses.poft_loss, z(4), z(4) + 1, z(4, 1) * NAN),
        ValueError,
        "aligned_mean_logps: w",
    ),
    ("poft: bool lengths", call(losses.poft_loss, z(4), z(4).bool(), z(4, 2)), TypeError, "lengths: wanted"),
    # groups
    (
        "spl: rewards NaN",
        call(losses.spl_loss, z(4), z(4), bad(1, NAN), alpha=1.0, beta=0.1, **G),
        ValueError,
        "rewards: wanted finite",
    ),
    (
        "qempo: rewards inf",
        call(losses.qempo_loss, z(4), bad(0, -INF), lam=1.0, **G),
        ValueError,
        "rewards: wanted finite",
    ),
    (
        "qempo: rewards None",
        call(losses.qempo_loss, z(4), None, lam=1.0, **G),
        TypeError,
        "rewards: wanted a tensor",
    ),
    (
        "qempo: int rewards",
        call(losses.qempo_loss, z(4), z(4).int(), lam=1.0, **G),
        TypeError,
        "rewards: wanted float16",
    ),
    (
        "qempo: rewards shorter",
        call(losses.qempo_loss, z(4), z(2), lam=1.0, **G),
        ValueError,
        "rewards: wanted shape",
    ),
    (
        "qempo: neither layout",
        call(losses.qempo_loss, z(4), z(4), lam=1.0),
        ValueError,
        "exactly one of group_size and offsets",
    ),
    (
        "qempo: both layouts",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, offsets=torch.tensor([0, 4]), **G),
        ValueError,
        "exactly one of group_size and offsets",
    ),
    (
        "qempo: 4 / 3",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, group_size=3),
        ValueError,
        "group_size: wanted a divisor",
    ),
    (
        "qempo: group_size 0",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, group_size=0),
        ValueError,
        "group_size: wanted an int",
    ),
    (
        "qempo: group_size 2.0",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, group_size=2.0),
        TypeError,
        "group_size: wanted an int",
    ),
    (
        "qempo: offsets short",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, offsets=torch.tensor([0, 3])),
        ValueError,
        "offsets: wanted",
    ),
    (
        "qempo: offsets fall",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, offsets=torch.tensor([0, 3, 1, 4])),
        ValueError,
        "offsets: wanted",
    ),
    (
        "qempo: offsets float",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, offsets=torch.tensor([0.0, 4.0])),
        TypeError,
        "offsets: wanted int",
    ),
    (
        "qempo: an empty group",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, baseline="none", offsets=torch.tensor([0, 2, 2, 4])),
        ValueError,
        "offsets: wanted groups of at least one",
    ),
    (
        "qempo: loo of one",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, group_size=1),
        ValueError,
        "group_size: wanted groups of at least 2",
    ),
    (
        "qempo: mean of one",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, baseline="mean", offsets=torch.tensor([0, 3, 4])),
        ValueError,
        "offsets: wanted groups of at least 2",
    ),
    (
        "qempo: baseline",
        call(losses.qempo_loss, z(4), z(4), lam=1.0, baseline="std", **G),
        ValueError,
        "baseline: wanted 'loo'",
    ),
    (
        "qempo kl: no reference",
        call(losses.qempo_kl_loss, z(4), None, z(4), lam=1.0, mu=0.5, **G),
        ValueError,
        "ref_logps: wanted",
    ),
    (
        "spl: no reference",
        call(losses.spl_loss, z(4), None, z(4), alpha=1.0, beta=0.5, **G),
        ValueError,
        "ref_logps: wanted",
    ),
    (
        "spl: beta inf",
        call(losses.spl_loss, z(4), z(4), z(4), alpha=1.0, beta=INF, **G),
        ValueError,
        "beta: wanted a finite",
    ),
    (
        "variance: one",
        call(losses.variance_loss, z(4), z(4), z(4), alpha=1.0, beta=0.5, group_size=1),
        ValueError,
        "group_size: wanted groups of at least 2",
    ),
    (
        "variance: alpha 0",
        call(losses.variance_loss, z(4), z(4), z(4), alpha=0.0, beta=0.5, **G),
        ValueError,
        "alpha: wanted",
    ),
    ("gvpo: beta 0", call(losses.gvpo_loss, z(4), z(4), z(4), beta=0.0, **G), ValueError, "beta: wanted"),
    (
        "rspo: k = 0",
        call(losses.rspo_loss, z(4), z(4), k=0, **G),
        ValueError,
        "k: wanted an int of at least 1",
    ),
    ("rspo: k float", call(losses.rspo_loss, z(4), z(4), k=2.0, **G), TypeError, "k: wanted an int"),
    (
        "rspo: k > n",
        call(losses.rspo_loss, z(4), z(4), k=3, **G),
        ValueError,
        "^k: wanted at most 2, the smallest group, got 3$",
    ),
    (
        "rspo: ragged k > n",
        call(losses.rspo_loss, z(4), z(4), k=2, offsets=torch.tensor([0, 3, 4])),
        ValueError,
        "^k: wanted at most 1, the smallest group, got 2$",
    ),
    (
        "rspo: ragged k = 1, n = 1",
        call(losses.rspo_loss, z(4), z(4), k=1, offsets=torch.tensor([0, 3, 4])),
        ValueError,
        "^offsets: wanted groups of at least 2 samples for this baseline",
    ),
    (
        "rspo: an empty group",
        call(losses.rspo_loss, z(4), z(4), k=3, offsets=torch.tensor([0, 0, 4])),
        ValueError,
        "^offsets: wanted groups of at least one sample",
    ),
    (
        "rspo: nested rewards",
        call(losses.rspo_loss, z(4), torch.nested.nested_tensor([z(2), z(2)]), k=1, **G),
        TypeError,
        "^rewards: wanted a plain tensor .* a nested tensor",
    ),
    (
        "pg: sparse advantages",
        call(losses.policy_gradient_loss, z(4), z(4).to_sparse()),
        TypeError,
        "^advantages: wanted a dense tensor",
    ),
    (
        "epa: nested strong",
        call(losses.epa_loss, z(4), torch.nested.nested_tensor([z(2), z(3)]), *EPA[2:]),
        TypeError,
        "^strong: wanted a plain tensor",
    ),
    (
        "dpo: reduction an array",
        call(losses.dpo_loss, *P4, reduction=[["mean"]]),
        ValueError,
        "^reduction: wanted 'mean' or 'sum' or 'none', got ",
    ),
    (
        "dqo: width 0",
        call(losses.dqo_loss, z(4), z(4), z(4, 0), **G),
        ValueError,
        r"^embeddings: wanted a width of at least 1, got shape \(4, 0\)",
    ),
    (
        "dqo: groups of width 0",
        call(losses.dqo_loss, z(4), z(4), z(2, 2, 0)),
        ValueError,
        "^embeddings: wanted a width of at least 1",
    ),
    (
        "rspo: k = 1, n = 1",
        call(losses.rspo_loss, z(4), z(4), k=1, group_size=1),
        ValueError,
        "group_size: wanted groups of at least 2",
    ),
    # DQO
    (
        "dqo: embeddings NaN",
        call(losses.dqo_loss, *DQO[:2], z(4, 3) * NAN, **G),
        ValueError,
        "embeddings: wanted finite",
    ),
    ("dqo: rows", call(losses.dqo_loss, *DQO[:2], z(3, 3), **G), ValueError, "embeddings: wanted shape"),
    (
        "dqo: 1-D",
        call(losses.dqo_loss, *DQO[:2], z(4), **G),
        ValueError,
        r"embeddings: wanted shape \(S, d\) or",
    ),
    (
        "dqo: group_size against k",
        call(losses.dqo_loss, *DQO[:2], z(2, 2, 3), group_size=4),
        ValueError,
        "group_size: wanted 2",
    ),
    ("dqo: G k", call(losses.dqo_loss, *DQO[:2], z(3, 2, 3)), ValueError, "embeddings: wanted 4 rows"),
    (
        "dqo: 3-D, offsets",
        call(losses.dqo_loss, *DQO[:2], z(2, 2, 3), offsets=torch.tensor([0, 2, 4])),
        ValueError,
        "embeddings: wanted",
    ),
    ("dqo: no layout", call(losses.dqo_loss, *DQO), ValueError, "exactly one of group_size and offsets"),
    (
        "dqo: baseline",
        call(losses.dqo_loss, *DQO, baseline="mean", **G),
        ValueError,
        "baseline: wanted 'loo' or 'reward'",
    ),
    (
        "dqo: one",
        call(losses.dqo_loss, *DQO, baseline="reward", group_size=1),
        ValueError,
        "group_size: wanted groups of at least 2",
    ),
    ("dqo: alpha < 0", call(losses.dqo_loss, *DQO, alpha=-1.0, **G), ValueError, "alpha: wanted"),
    ("dqo: beta alone", call(losses.dqo_loss, *DQO, beta=0.1, **G), ValueError, "ref_logps: wanted"),
    # tokens
    (
        "grpo: old None",
        call(losses.grpo_loss, z(6), None, *TOKENS[2:]),
        TypeError,
        "old_token_logps: wanted a tensor",
    ),
    (
        "grpo: advantages NaN",
        call(losses.grpo_loss, *TOKENS[:2], bad(0, NAN, 2), TOKENS[3]),
        ValueError,
        "advantages: wanted finite",
    ),
    (
        "grpo: advantages (N,)",
        call(losses.grpo_loss, *TOKENS[:2], z(6), TOKENS[3]),
        ValueError,
        r"advantages: wanted shape \(2\)",
    ),
    (
        "grpo: cu_seqlens end",
        call(losses.grpo_loss, *TOKENS[:3], torch.tensor([0, 2, 5])),
        ValueError,
        "cu_seqlens: wanted",
    ),
    (
        "grpo: cu_seqlens fall",
        call(losses.grpo_loss, *TOKENS[:2], z(3), torch.tensor([0, 4, 2, 6])),
        ValueError,
        "cu_seqlens: wanted",
    ),
    (
        "grpo: kl alone",
        call(losses.grpo_loss, *TOKENS, kl=0.1),
        ValueError,
        "ref_token_logps: wanted .* kl > 0",
    ),
    ("grpo: kl < 0", call(losses.grpo_loss, *TOKENS, kl=-0.1), ValueError, "kl: wanted"),
    ("grpo: eps_low < 0", call(losses.grpo_loss, *TOKENS, eps_low=-0.1), ValueError, "eps_low: wanted"),
    ("grpo: ratio", call(losses.grpo_loss, *TOKENS, ratio="group"), ValueError, "ratio: wanted 'token'"),
    (
        "grpo: normalize",
        call(losses.grpo_loss, *TOKENS, normalize="batch"),
        ValueError,
        "normalize: wanted 'sequence'",
    ),
    ("grpo: normalize 0", call(losses.grpo_loss, *TOKENS, normalize=0), ValueError, "normalize: wanted"),
    # advantages and coefficients
    ("policy gradient: no advantages", call(losses.policy_gradient_loss, z(4), None), TypeError, "advantages: w"),
    ("policy gradient: NaN", call(losses.policy_gradient_loss, z(4), bad(1, NAN)), ValueError, "advantages: wanted f"),
    ("policy gradient: lengths", call(losses.policy_gradient_loss, z(4), z(3)), ValueError, "advantages: wanted shape"),
    (
        "advantages: one",
        call(losses.group_advantages, z(4), group_size=1),
        ValueError,
        "group_size: wanted groups of at least 2",
    ),
    (
        "advantages: none",
        call(losses.group_advantages, z(4), baseline="none", **G),
        ValueError,
        "baseline: wanted 'mean'",
    ),
    (
        "advantages: scale",
        call(losses.group_advantages, z(4), scale="max", **G),
        ValueError,
        "scale: wanted 'std'",
    ),
    (
        "advantages: NaN",
        call(losses.group_advantages, bad(0, NAN), **G),
        ValueError,
        "rewards: wanted finite",
    ),
    (
        "coefficients: list",
        call(losses.coefficients, losses.dpo_loss, [z(4), z(4)], z(4), z(4)),
        TypeError,
        "logps: wanted a tensor or a tuple",
    ),
    (
        "coefficients: int",
        call(losses.coefficients, losses.qempo_loss, z(4).long(), z(4), lam=1.0, **G),
        TypeError,
        "logps: wanted float16",
    ),
    (
        "coefficients: no function",
        call(losses.coefficients, "dpo", z(4)),
        TypeError,
        "^loss_fn: wanted a loss of log-probs, got str",
    ),
    (
        "coefficients: no graph",
        call(losses.coefficients, lambda x: x.detach().sum(), z(4)),
        ValueError,
        "^loss_fn: wanted a loss with a graph",
    ),
    (
        "coefficients: not a scalar",
        call(losses.coefficients, losses.dpo_loss, P2, z(4), z(4), reduction="none"),
        ValueError,
        "loss_fn: wanted a scalar",
    ),
]
