"""`gram`: XᵀX of the inputs of every linear layer, the mean over examples of the sum over tokens.

Jin et al. 2022 (arXiv 2212.09849). The paper's sum differs by the number of examples, which would
otherwise weigh one model against another.
"""

from __future__ import annotations

from fisher_mergekit.measure.described import described
from fisher_mergekit.measure.kinds import INPUTS, Measured, Stored

NEEDS = frozenset({INPUTS})


def stored(measured: Measured) -> Stored:
    """Return the input factors, each once for all weights that share it."""
    return described("gram", measured, lambda group: measured.examples)
