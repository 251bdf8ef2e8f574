"""`kfac`: the Kronecker-factored Fisher of every linear layer, XᵀX ⊗ GᵀG.

Tam et al. 2023 (arXiv 2312.04339), after Martens & Grosse 2015 (arXiv 1503.05671). A weight's
gradient is a sum over tokens of g xᵀ. As if g and x were independent, and tokens too,

    mean over examples of Σ_t (x xᵀ) ⊗ (g gᵀ)  ≈  (mean of x xᵀ over tokens) ⊗ (Σ g gᵀ / examples)
"""

from __future__ import annotations

from torch import Tensor

from fisher_mergekit.measure.described import described
from fisher_mergekit.measure.groups import Group
from fisher_mergekit.measure.kinds import INPUTS, OUTPUTS, Measured, Stored

NEEDS = frozenset({INPUTS, OUTPUTS})


def stored(measured: Measured) -> Stored:
    """Return input factors, each once for all weights that share it, and output factors."""
    return described("kfac", measured, _rows, outputs=True)


def _rows(group: Group) -> Tensor:
    """Return how many rows there were; an expert that got none has zeros to divide."""
    assert group.rows is not None
    return group.rows.clamp_min(1)
