"""The output's vocabulary: built in planning, where it costs little and every mistake can be told.

With `tokenizer_source` or `tokenizer`, mergekit gives the output a tokenizer of its own and brings
each model's rows of tokens in its order; with `--unsafe-truncate-embeddings` it cuts them to the
smallest vocabulary. What the recipe asks for is checked here, the rows are `aligning.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference, set_config_value
from mergekit.plan import MergePlanner
from mergekit.tokenizer import TokenizerInfo
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding

from fisher_mergekit.errors import nearest
from fisher_mergekit.merging.aligning import BUILT, Tokenizer
from fisher_mergekit.merging.slots import Slot, Source
from fisher_mergekit.precision.rows import ABSENT

LOG = logging.getLogger(__name__)

_TELLS_OF_A_TOKENIZER = ("token", "vocab", "piece")
"""Parts of the names of the files that tokenizers are saved in."""


@dataclass(frozen=True)
class Vocabulary:
    """What becomes of the tables of tokens.

    Attributes:
        tokenizer: the task that gives the output its tokenizer; None if rows are left as they are,
            or cut.
        info: what it gives, once it is built.
        tokens: what the recipe says of single tokens.
        multiple: the output's rows are padded to a multiple of it.
        is_cut: whether the models' rows are cut to the smallest vocabulary.
    """

    tokenizer: Tokenizer | None = None
    info: TokenizerInfo | None = None
    tokens: Mapping[str, TokenEmbeddingConfig] = field(default_factory=dict)
    multiple: int | None = None
    is_cut: bool = False

    @property
    def changes(self) -> bool:
        """Whether tables of tokens may come out in another size or order than they went in."""
        return self.tokenizer is not None or self.is_cut

    @property
    def forced(self) -> tuple[str, ...]:
        """Tokens that all models get from one source."""
        return tuple(token for token, config in self.tokens.items() if config.force)

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """Return the shape of an output tensor that is brought in line."""
        shape, axis = slot.sources[0].tensor.shape, slot.weight.vocabulary_axis
        return (*shape[:axis], self.rows(slot), *shape[axis + 1 :])

    def rows(self, slot: Slot) -> int:
        """Return how many rows of tokens an output tensor has, one that is brought in line."""
        axis = slot.weight.vocabulary_axis
        assert axis is not None
        if self.tokenizer is None:
            sizes: list[int] = [source.tensor.shape[axis] for source in slot.aligned]
            return min(sizes)
        assert self.info is not None
        return _padded(len(self.info.tokenizer.get_vocab()), self.multiple)


def find(planner: MergePlanner) -> tuple[Vocabulary, list[str]]:
    """Build the output's tokenizer, if the recipe asks for one; and let mergekit write that.

    Args:
        planner: mergekit's; its task for the tokenizer is replaced.

    Returns:
        What becomes of the tables of tokens, and what is wrong.
    """
    config, task = planner.config, planner._tokenizer_task
    if task is None:
        return Vocabulary(is_cut=planner.options.unsafe_truncate_embeddings), []
    own = Tokenizer(**{name: getattr(task, name) for name in type(task).model_fields})
    planner._tokenizer_task = own
    multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
    tokens = (config.tokenizer.tokens if config.tokenizer else None) or {}
    found = Vocabulary(own, None, tokens, multiple or None)
    if config.base_model is None and own.tokenizer_source == "base":
        return found, [
            "the tokenizer is to be base_model's, and the recipe names none. Add `base_model:` at "
            "the top, or write `union`."
        ]
    if multiple is not None and multiple < 1:
        return found, [f"tokenizer: pad_to_multiple_of is {multiple}; it must be 1 or more."]
    sources = [*own.referenced_models]
    if isinstance(own.tokenizer_source, ModelReference):
        if misspelt := _misspelt(str(own.tokenizer_source)):
            return found, [misspelt]
        sources.append(own.tokenizer_source)
    without = [model for model in dict.fromkeys(sources) if not _may_have_tokenizer(model)]
    if without:
        return found, [_without_tokenizer(str(model)) for model in without]
    if config.base_model is None:
        LOG.warning(
            "The recipe names no base_model, so that mergekit makes the output's tokenizer and "
            "configuration like those of any of the models. Name one to have the same each time."
        )
    try:
        info = BUILT.anew(own)
    except Exception as error:  # whatever a tokenizer's code stumbles over
        told = (str(error).splitlines() or [type(error).__name__])[0]
        return found, [f"mergekit cannot build the output's tokenizer: {told}"]
    lacking = [m for m in own.referenced_models if m not in info.original_vocabs]
    problems = [_without_tokenizer(str(model)) for model in lacking]
    numbers = info.tokenizer.get_vocab()
    if max(numbers.values()) >= len(numbers):
        problems.append(
            f"the output's tokenizer has {len(numbers)} tokens, but numbers them up to "
            f"{max(numbers.values())}, and mergekit makes as many rows as there are tokens. Choose "
            "another `tokenizer_source:`."
        )
    return Vocabulary(own, info, tokens, multiple or None), problems


def problems_of(slots: Sequence[Slot], vocabulary: Vocabulary) -> list[str]:
    """Say which rows the recipe asks for and the models do not have."""
    if vocabulary.info is None:
        return []
    problems: dict[str, None] = {}
    for slot in slots:
        if slot.aligned:
            told = [*_unfit(slot, vocabulary.info), *_unsourced(slot, vocabulary, vocabulary.info)]
            problems.update(dict.fromkeys(told))
    return list(problems)


def settle(planner: MergePlanner, vocabulary: Vocabulary) -> Any:
    """Let the output's configuration say how large its vocabulary is, where mergekit does not.

    mergekit writes the size after the merge, for most kinds of models of pictures and text beside
    the place that is read.

    Returns:
        The configuration as it will be written, to look at.
    """
    if vocabulary.info is None:
        return planner.out_model_config
    size = _padded(len(vocabulary.info.tokenizer.get_vocab()), vocabulary.multiple)
    try:
        inner = planner.out_model_config.get_text_config()
    except ValueError:  # there are several
        inner = planner.out_model_config
    if inner is not planner.out_model_config and hasattr(inner, "vocab_size"):
        inner.vocab_size = size
    config = deepcopy(planner.out_model_config)
    set_config_value(config, planner.arch_info.vocab_size_config_key or "vocab_size", size)
    return config


def _padded(count: int, multiple: int | None) -> int:
    return count if multiple is None else -(-count // multiple) * multiple


def _unfit(slot: Slot, info: TokenizerInfo) -> list[str]:
    """Say whose tokenizer has tokens for which there are no rows."""
    problems = []
    for source in slot.aligned:
        size = source.tensor.shape[slot.weight.vocabulary_axis]
        if source.model not in info.permutations:
            problems.append(
                f"{source.model} is base_model of a slice only, and mergekit does not align its "
                "vocabulary. Name it as the recipe's `base_model:`."
            )
        elif (last := max(info.permutations[source.model].values())) >= size:
            problems.append(
                f"the tokenizer of {source.model} numbers tokens up to {last}, but "
                f"{source.tensor.name} has {size} rows. Give the model its own tokenizer."
            )
    return problems


def _unsourced(slot: Slot, vocabulary: Vocabulary, info: TokenizerInfo) -> list[str]:
    """Say which of the recipe's `tokens` name a source that is not there."""
    problems = []
    models = {source.model: source for source in slot.aligned}
    numbers = info.tokenizer.get_vocab()
    for token, config in vocabulary.tokens.items():
        where, number = f"tokenizer: tokens: {token!r}", numbers.get(token)
        if number is None:
            problems.append(
                f"{where}: the output's tokenizer takes it for another spelling of one that it "
                "has; leave it out."
            )
            continue
        places = [info.permutations.get(model, {}).get(number, ABSENT) for model in models]
        if min(places, default=ABSENT) >= 0 and not config.force:
            continue  # every model has a row of its own, and mergekit asks for no other
        if config.source is None:
            which = "to force on all models" if config.force else "for models that lack it"
            problems.append(
                f"{where}: there is no `source:` of the row {which}. Name a model, "
                "`{kind: zero}`, or `{kind: model_token, model: …, token: …}`."
            )
        elif not isinstance(config.source, ZeroEmbedding):
            told = _missing(config.source, slot, models, info, token, number)
            if told:
                problems.append(f"{where}: {told}")
    return problems


def _missing(
    wanted: ModelTokenEmbedding | ModelReference,
    slot: Slot,
    models: Mapping[ModelReference, Source],
    info: TokenizerInfo,
    token: str,
    number: int,
) -> str | None:
    """Say why a model's row is not there, if it is not."""
    of_token = isinstance(wanted, ModelTokenEmbedding)
    model = wanted.model if of_token else wanted
    if model not in models or model not in info.permutations:
        return (
            f"its source {model} is none of the models of {slot.name}: "
            f"{', '.join(map(str, models))}. Name one of them, in the same spelling."
        )
    place = info.permutations[model].get(number, ABSENT)
    if of_token and wanted.token is not None:
        token = wanted.token
        place = info.original_vocabs[model].get(token, ABSENT)
    elif of_token:
        place = wanted.token_id
    if place < 0 and not (of_token and wanted.token is None):
        known = nearest(token, info.original_vocabs[model])
        return f"its source {model} has no token {token!r}.{known}"
    size = models[model].tensor.shape[slot.weight.vocabulary_axis]
    if not 0 <= place < size:
        return f"{place} is no token of its source {model}, which has {size} rows in {slot.name}."
    return None


def _misspelt(source: str) -> str | None:
    """Say that a word was meant by what mergekit takes for a model; the Hub is not asked for it."""
    meant = nearest(source, ("union", "base"), cutoff=0.75)
    if not meant or "/" in source or Path(source).exists():
        return None
    return f"tokenizer_source: {source} is taken for a model, and there is none here.{meant}"


def _may_have_tokenizer(model: ModelReference) -> bool:
    """Whether a local model's folder has a file of a tokenizer; one elsewhere is asked by mergekit.

    Without any, transformers makes some classes' tokenizers up, of special tokens alone.
    """
    folder = Path(model.model.path)
    if not folder.is_dir():
        return True
    return any(
        part in path.name.lower() for path in folder.iterdir() for part in _TELLS_OF_A_TOKENIZER
    )


def _without_tokenizer(model: str) -> str:
    return (
        f"{model} has no tokenizer that transformers can load, so nobody knows which of its rows "
        "is which token. Save its tokenizer in its folder."
    )
