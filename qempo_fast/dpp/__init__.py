"""Diversity of groups of embeddings under a determinantal point process."""

from .gains import DppGains, dpp_gains, dpp_logdet
from .select import dpp_select

__all__ = ["DppGains", "dpp_gains", "dpp_logdet", "dpp_select"]
