"""Every bad call raises the named error before any work, and leaves its inputs as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import constraint_bad_input
import dpp_bad_input
import logps_bad_input
import losses_bad_input
import metrics_bad_input
import pytest
import torch

TABLES = {
    "logps": logps_bad_input.ROWS,
    "dpp": dpp_bad_input.ROWS,
    "losses": losses_bad_input.ROWS,
    "constraint": constraint_bad_input.ROWS,
    "metrics": metrics_bad_input.ROWS,
}
ROWS = [(f"{name}: {row[0]}", *row[1:]) for name, rows in TABLES.items() for row in rows]


def tensors(x: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested arguments whose memory can be read."""
    if isinstance(x, torch.Tensor):
        if x.device.type != "meta" and x.layout is torch.strided and not (x.is_nested or x.is_quantized):
            yield x
    elif isinstance(x, dict):
        yield from tensors(list(x.values()))
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from tensors(part)


@pytest.mark.parametrize(("make", "error", "message"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_bad_call(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    function, args, keywords = make()
    before = [x.detach().clone() for x in tensors([args, keywords])]
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message):
        function(*args, **keywords)
    for now, then in zip(tensors([args, keywords]), before, strict=True):
        assert torch.equal(now.nan_to_num(nan=1e9), then.nan_to_num(nan=1e9))
        assert now.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_table_is_long_and_its_names_are_unique() -> None:
    names = [r[0] for r in ROWS]
    assert len(names) == len(set(names)) >= 40
