"""What can be reproduced: each claim, its paper, and how long it takes. Importing this loads no model library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reproduction:
    """One claim of one paper; ``experiments.RUN`` has the function of the same name."""

    paper: str
    claim: str
    minutes: int  # of CPU time at full size, one thread of a Zen 5


REPRODUCTIONS = {
    "dqo-cities": Reproduction(
        "DQO, arXiv:2509.04784", "DQO keeps distinct answers where GRPO collapses, at no loss of quality", 6
    ),
    "spl-temperature": Reproduction(
        "SPL, arXiv:2511.08594", "SPL is a Pareto improvement over sampling the RLHF model at a token temperature", 10
    ),
    "rspo-passk": Reproduction(
        "RSPO, arXiv:2508.01174", "training for Pass@k reaches a higher Pass@k than training for the mean reward", 13
    ),
    "qempo-entropy": Reproduction(
        "QEMPO, arXiv:2602.15894", "at RLHF's reward, QEMPO has more entropy than QEMPO-KL, and that more than RLHF", 9
    ),
}
