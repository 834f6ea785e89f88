"""The Triton kernels of the DPP ops."""

from __future__ import annotations

import functools

from ..kernels import dpp as _dpp
from ..kernels import dpp_select as _select
from . import _gpu

LAUNCHERS = _gpu.Launchers(_dpp.dpp_fwd, _dpp.dpp_bwd, _select.dpp_select)
dpp = functools.partial(_gpu.dpp_fwd, LAUNCHERS)
dpp_select = functools.partial(_gpu.dpp_select, LAUNCHERS)
