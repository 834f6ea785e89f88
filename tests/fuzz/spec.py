"""One call as a line of text: "linear_logps 17 weight=transposed targets=expanded @no_grad"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from . import changes, modes
from .operators import CALLED


@dataclass(frozen=True)
class Spec:
    """changes are (argument, change), in the order in which they are made."""

    function: str
    seed: int
    changes: tuple[tuple[str, str], ...] = ()
    mode: str = "plain"

    def __str__(self) -> str:
        parts = [self.function, str(self.seed), *(f"{name}={change}" for name, change in self.changes)]
        return " ".join([*parts, f"@{self.mode}"])

    @staticmethod
    def parse(line: str) -> Spec:
        function, seed, *rest, mode = line.split()
        return Spec(function, int(seed), tuple(tuple(part.split("=")) for part in rest), mode.removeprefix("@"))  # type: ignore[misc]

    def simpler(self) -> list[Spec]:
        """The same with one thing less."""
        fewer = [replace(self, changes=self.changes[:i] + self.changes[i + 1 :]) for i in range(len(self.changes))]
        return fewer if self.mode == "plain" else [replace(self, mode="plain"), *fewer]


def draw(seed: int, index: int, only: str = "") -> Spec:
    """Call number index of a run."""
    rng = Random(f"{seed} {index}")
    names = [name for name in CALLED if only in name]
    name = rng.choices(names, [CALLED[name].weight for name in names])[0]
    function, own = CALLED[name], rng.randrange(2**31)
    plain = function.make(own)
    made: list[tuple[str, str]] = []
    for argument in rng.sample(list(plain), min(len(plain), rng.choices((0, 1, 2, 3), (15, 50, 25, 10))[0])):
        fitting = changes.fitting(plain[argument])
        made.append((argument, rng.choices(list(fitting), list(fitting.values()))[0]))
    return Spec(name, own, tuple(made), modes.draw(rng, function))
