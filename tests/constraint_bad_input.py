"""Bad calls of the constraint: (id, make, error, message); make() gives (function, args, keywords)."""

from __future__ import annotations

import torch
from losses_bad_input import INF, NAN, Row, bad, call, z

from qempo_fast import constraint

C = constraint.QualityConstraint

ROWS: list[Row] = [
    (
        "solve: 2-D",
        call(constraint.solve_qempo, z(2, 2), min_reward=0.0),
        ValueError,
        "rewards: wanted 1 dim",
    ),
    (
        "solve: empty",
        call(constraint.solve_qempo, z(0), min_reward=0.0),
        ValueError,
        "rewards: wanted at least one",
    ),
    (
        "solve: NaN",
        call(constraint.solve_qempo, bad(0, NAN), min_reward=0.0),
        ValueError,
        "rewards: wanted finite",
    ),
    (
        "solve: floor",
        call(constraint.solve_qempo, z(4), min_reward=0.5),
        ValueError,
        r"min_reward: wanted at most 0\.0",
    ),
    (
        "solve: floor NaN",
        call(constraint.solve_qempo, z(4), min_reward=NAN),
        ValueError,
        "min_reward: wanted",
    ),
    (
        "solve: cap, no reference",
        call(constraint.solve_qempo, z(4), min_reward=0.0, max_kl=1.0),
        ValueError,
        "ref_logps: wanted",
    ),
    (
        "solve: cap < 0",
        call(constraint.solve_qempo, z(4), z(4), min_reward=0.0, max_kl=-1.0),
        ValueError,
        "max_kl: wanted",
    ),
    (
        "solve: reference -inf",
        call(constraint.solve_qempo, z(4), bad(0, -INF), min_reward=0.0, max_kl=1.0),
        ValueError,
        "ref_logps: wanted finite",
    ),
    (
        "solve: infeasible",
        call(constraint.solve_qempo, bad(0, 1.0), z(4), min_reward=0.9, max_kl=0.1),
        ValueError,
        r"max_kl: wanted at least 0\.951",
    ),
    (
        "solve: spread",
        call(constraint.solve_qempo, 1e308 * torch.tensor([1.0, -1.0], dtype=torch.float64), min_reward=0.0),
        ValueError,
        "rewards: wanted a spread",
    ),
    ("target: alpha 0", call(constraint.target_distribution, z(4), alpha=0.0), ValueError, "alpha: wanted"),
    (
        "target: beta alone",
        call(constraint.target_distribution, z(4), alpha=1.0, beta=0.1),
        ValueError,
        "ref_logps: wanted",
    ),
    (
        "target: 0-D",
        call(constraint.target_distribution, torch.tensor(1.0), alpha=1.0),
        ValueError,
        "rewards: wanted at least 1",
    ),
    (
        "target: reference NaN",
        call(constraint.target_distribution, z(4), bad(1, NAN), alpha=1.0, beta=0.1),
        ValueError,
        "ref_logps: wanted",
    ),
    ("constraint: floor", call(C, None), TypeError, "min_reward: wanted a number"),
    ("constraint: cap", call(C, 0.5, max_kl=-0.1), ValueError, "max_kl: wanted"),
    ("constraint: lr 0", call(C, 0.5, lr=0.0), ValueError, "lr: wanted"),
    ("constraint: lam 0", call(C, 0.5, lam=0.0), ValueError, "lam: wanted"),
    ("constraint: lam_min 0", call(C, 0.5, lam_min=0.0), ValueError, "lam_min: wanted"),
    ("constraint: step", call(C, 0.5, step="newton"), ValueError, "step: wanted 'additive'"),
    ("constraint: damping", call(C, 0.5, damping=-1.0), ValueError, "damping: wanted"),
    ("constraint: damping NaN", call(C, 0.5, damping=NAN), ValueError, "damping: wanted"),
    ("constraint: smoothing 1", call(C, 0.5, smoothing=1.0), ValueError, "smoothing: wanted"),
    ("update: NaN", call(C(0.5).update, bad(0, NAN)), ValueError, "rewards: wanted finite"),
    ("update: empty", call(C(0.5).update, z(0)), ValueError, "rewards: wanted at least one"),
    (
        "update: meta",
        call(C(0.5).update, torch.zeros(3, device="meta")),
        ValueError,
        "rewards: wanted values that can be read",
    ),
    ("update: None", call(C(0.5).update, None), TypeError, "rewards: wanted a number, got NoneType"),
    ("update: ints", call(C(0.5).update, torch.ones(3, dtype=torch.int64)), TypeError, "rewards: wanted float16"),
    ("update: sparse", call(C(0.5).update, torch.ones(3).to_sparse()), TypeError, "rewards: wanted a dense tensor"),
    ("constraint: step None", call(C, 0.5, step=None), ValueError, "step: wanted 'additive' .*None"),
    (
        "solve: meta",
        call(constraint.solve_qempo, torch.zeros(3, device="meta"), min_reward=0.0),
        ValueError,
        "rewards: wanted values that can be read",
    ),
    (
        "target: no response",
        call(constraint.target_distribution, z(3, 0), alpha=1.0),
        ValueError,
        "rewards: wanted at least 1 dimension and 1 response",
    ),
    (
        "target: no response that the reference gives",
        call(constraint.target_distribution, z(2, 2), torch.full((2, 2), -INF), alpha=1.0, beta=0.1),
        ValueError,
        "ref_logps: wanted a response that the reference gives",
    ),
    ("update: no kl", call(C(0.5, max_kl=1.0).update, z(4)), ValueError, "kl: wanted an estimate"),
    ("update: kl alone", call(C(0.5).update, z(4), kl=0.1), ValueError, "kl: wanted None"),
]
