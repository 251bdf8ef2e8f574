"""Heads with one number a class for the whole input, of texts, pictures or sounds.

Which likelihood they were trained with is not in their name but in the configuration, by the rule
of transformers: `problem_type`, or where it is missing, regression for a single output and one of
several classes otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fisher_mergekit.measure.likelihoods.base import Likelihood

SINGLE_LABEL = "single_label_classification"

HEADS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
    "ForAudioClassification",
)


class Classifier(Likelihood):
    """One of the likelihoods that these heads can have."""

    problem: ClassVar[str]
    """The `problem_type` that means this one."""

    @classmethod
    def fits(cls, architecture: str, config: Any) -> bool:
        return super().fits(architecture, config) and _problem(config) == cls.problem


def _problem(config: Any) -> str:
    if config is None:
        return SINGLE_LABEL
    named = getattr(config, "problem_type", None)
    return str(named or ("regression" if config.num_labels == 1 else SINGLE_LABEL))
