"""A mergekit recipe plus our keys, validated.

One file serves two commands. `mergekit-yaml` reads mergekit's part and ignores the rest; here all
of it is read, and what mergekit would drop in silence is refused: unknown and misspelt keys.

    written.py       the recipe's text, and what YAML loses of it
    blocks.py        the recipe's mappings, as written and as mergekit understands them
    calibration.py   `calibration`, of the recipe or of a model: what to measure on, and how
    parameters.py    `parameters`: lambda, weight and sidecar of a model; the method's own; exclude
    dropped.py       keys that have no effect where they stand
    mistakes.py      what is wrong with it, as far as it alone tells
    reading.py       the whole recipe, as the measuring step reads it
"""

from fisher_mergekit.recipe.calibration import (
    Attention,
    Calibration,
    Dtype,
    Estimator,
    Kind,
    SidecarDtype,
    Unit,
    read_calibration,
)
from fisher_mergekit.recipe.mistakes import recipe_problems, slices_of
from fisher_mergekit.recipe.parameters import exclude_patterns, parameter_blocks
from fisher_mergekit.recipe.reading import (
    Recipe,
    RecipeModel,
    measured_as,
    parse_config,
    read_recipe,
)

__all__ = [
    "Attention",
    "Calibration",
    "Dtype",
    "Estimator",
    "Kind",
    "Recipe",
    "RecipeModel",
    "SidecarDtype",
    "Unit",
    "exclude_patterns",
    "measured_as",
    "parameter_blocks",
    "parse_config",
    "read_calibration",
    "read_recipe",
    "recipe_problems",
    "slices_of",
]
