"""The model that is measured, and what of it is which tensor in its files.

In memory a tensor can have another name than on disk, or be packed with others into one parameter
(`fisher_mergekit/sidecar/layout.py`). A sidecar has the names and shapes on disk. Where each number
comes from is *compared by value*: a parameter that does not hold what the files have at the place
it is filed under would put one tensor's Fisher on another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from fisher_mergekit.errors import CheckpointError, MeasureError
from fisher_mergekit.measure.adapter import ADAPTER_STEM, load_adapter, read_adapter_config
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import WeightRecord
from fisher_mergekit.sidecar.layout import BLOCK, Group, Layout, skeleton


@dataclass(frozen=True)
class Subject:
    """A loaded model and its files.

    Attributes:
        model: on its device, in the dtype to compute in.
        architecture: name of its transformers class.
        checkpoint: its files.
        groups: the floating tensors in the files that become parameters, and which.
        unmeasured: the other floating tensors in the files, and why they are not measured.
    """

    model: nn.Module
    architecture: str
    checkpoint: Checkpoint
    groups: tuple[Group, ...]
    unmeasured: dict[str, str]

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        config: PretrainedConfig = self.model.config
        return config

    @property
    def attention(self) -> str | None:
        """How it computes attention, as transformers calls it; None for a model without."""
        name: str | None = getattr(self.config, "_attn_implementation", None)
        return name

    @property
    def pad_token_id(self) -> int:
        """Any id to pad with; padding is masked."""
        return int(self.config.pad_token_id or 0)

    @property
    def measured(self) -> list[nn.Parameter]:
        """The parameters that the groups name: all of a model's, or an adapter's own."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return list(dict.fromkeys(parameters[n] for group in self.groups for n in group.targets))

    def weight_records(self) -> dict[str, WeightRecord]:
        """Return the identity of every tensor in the files, measured or not."""
        return {name: WeightRecord.of(info) for name, info in self.checkpoint.items()}

    def on_disk(self, values: MutableMapping[nn.Parameter, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every measured tensor's name in the files, and its values in its shape there.

        Args:
            values: one tensor a parameter, in its shape. Each is taken out after its last use, so
                that what has to be moved does not stand in memory twice.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        left = Counter(parameters[name] for group in self.groups for name in group.targets)
        for group in self.groups:
            owners = {name: parameters[name] for name in group.targets}
            given = {name: values[owner] for name, owner in owners.items()}
            left.subtract(owners.values())
            for owner in set(owners.values()):
                if not left[owner]:
                    del values[owner]
            again = any(owner in values for owner in owners.values())
            for name, tensor in group.restore(given):
                # Files can hold a tied tensor under two names; safetensors writes no shared memory.
                yield name, tensor.clone() if again and group.is_plain else tensor
            del given


def read_config(folder: Path, *, trust_remote_code: bool = False) -> tuple[PretrainedConfig, str]:
    """Return a checkpoint's configuration, and the transformers class that it was saved from.

    Raises:
        CheckpointError: no readable config.json, or one that names no architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a validator of its own for every field of every architecture
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{folder} brings code of its own, which is not run unasked. Read it, and if you "
                "trust it add --trust-remote-code, here and for mergekit-yaml."
            ) from None
        raise CheckpointError(
            f"{folder} is not a model that transformers can read: {error}"
        ) from None
    if not config.architectures:
        raise CheckpointError(
            f"{folder}/config.json names no architecture; save the model with save_pretrained."
        )
    return config, str(config.architectures[0])


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers' own errors are bare Exceptions
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can read: {error}"
        ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Without files transformers makes up one to which every word is unknown.
        raise CheckpointError(
            f"{folder} has no tokenizer, or one without words. Put the model's tokenizer files "
            "(tokenizer.json and tokenizer_config.json) into its folder."
        )
    return tokenizer


def check_tensors(
    config: PretrainedConfig,
    architecture: str,
    checkpoint: Checkpoint,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Find out, without loading the model, whether the files hold all of it and no NaN.

    A model of remote code is not looked at: it is not run before it has to be.

    Raises:
        CheckpointError: a configuration that describes no model.
        MeasureError: a parameter without a tensor of its shape, or a value that is not finite.
    """
    try:
        model = outline(config, architecture, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder}/{error.message}") from None
    if model is None:
        return
    for group in _match(model, checkpoint)[0]:
        for source in group.sources:
            if not checkpoint.load(source.name).isfinite().all():
                made = [name for name in group.targets if name != source.name]
                of = f" ({', '.join(made)})" if made else ""
                raise MeasureError(
                    f"{source.name} in {source.file} holds NaN or infinity{of}. Nothing that is "
                    "computed with this model means anything; save it again from a sound copy."
                )


def outline(
    config: PretrainedConfig, architecture: str, *, trust_remote_code: bool
) -> nn.Module | None:
    """Return the model without memory for its parameters; None if only its own code describes it.

    Raises:
        CheckpointError: a configuration that describes no model.
    """
    if trust_remote_code and _has_own_code(config, architecture):
        return None
    return skeleton(config, architecture)


def load_subject(
    folder: Path,
    used: Collection[int] = (),
    *,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Subject:
    """Load a model for measuring, or an adapter in its model.

    Args:
        folder: the model's or the adapter's files.
        used: token ids in the calibration data; padding is none of them, if the model names none.
        base: the files of the model that the adapter was trained on.
        dtype: to compute in.
        attention: transformers' `attn_implementation`; its own choice if None, which is `sdpa` for
            models that have it.
        device: to compute on.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        CheckpointError: missing or damaged files, or pickles, or a model without such attention.
        MeasureError: tensors are missing from the files, or the model holds parameters that are
            not simply tensors of its files.
    """
    options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
    if base is not None:
        return _load_adapter(folder, base, used, dtype, device, options)
    checkpoint = Checkpoint(folder)
    config, architecture = read_config(folder, trust_remote_code=trust_remote_code)
    own = trust_remote_code and _has_own_code(config, architecture)
    model_class = _automatic_class(architecture) if own else _model_class(architecture)
    try:
        model = model_class.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    return _settled(model, checkpoint, *_match(model, checkpoint), architecture, used, device)


def _load_adapter(
    folder: Path,
    base: Path,
    used: Collection[int],
    dtype: torch.dtype,
    device: str | torch.device,
    options: dict[str, Any],
) -> Subject:
    config, architecture = read_adapter_config(
        folder, base, trust_remote_code=options["trust_remote_code"]
    )
    model, groups, unmeasured = load_adapter(
        folder, base, _model_class(architecture), config, dtype, **options
    )
    checkpoint = Checkpoint(folder, ADAPTER_STEM)
    return _settled(model, checkpoint, groups, unmeasured, architecture, used, device)


def _settled(
    model: Any,
    checkpoint: Checkpoint,
    groups: tuple[Group, ...],
    unmeasured: dict[str, str],
    architecture: str,
    used: Collection[int],
    device: str | torch.device,
) -> Subject:
    """Return a loaded model as a subject, once it is seen to hold what its files hold."""
    _settle_padding(model.config, used)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        _compare(checkpoint, group, parameters)
    return Subject(model.to(device), architecture, checkpoint, groups, unmeasured)


_AUTOMATIC = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""Which Auto class makes a model of remote code, by the end of its name."""


def _model_class(architecture: str) -> Any:
    """Return the transformers class, or the Auto class for remote code."""
    return getattr(transformers, architecture, None) or _automatic_class(architecture)


def _automatic_class(architecture: str) -> Any:
    ends = (name for head, name in _AUTOMATIC.items() if architecture.endswith(head))
    return getattr(transformers, next(ends, "AutoModelForCausalLM"))


def _has_own_code(config: PretrainedConfig, architecture: str) -> bool:
    """Whether a model brings its class, maybe under the name of one that transformers has too."""
    return _automatic_class(architecture).__name__ in (getattr(config, "auto_map", None) or {})


def _settle_padding(config: PretrainedConfig, used: Collection[int]) -> None:
    """Agree on one padding id: classifiers of decoders look for the last token that is not it.

    Where the model names none they look at the last token, be it the end-of-text token, and must
    go on to: it becomes an id that is in none of the texts. With all ids in use there is none, and
    such a classifier refuses batches. A model of several parts, as of images and text, keeps its
    words' ids with its text part.
    """
    text = config.get_text_config()
    words = getattr(text, "vocab_size", 0)
    named = [getattr(part, "pad_token_id", None) for part in (config, text)]
    padding = next((x for x in named if x is not None and 0 <= x < words), None)
    if padding is None:
        padding = next((x for x in range(words) if x not in used), None)
    config.pad_token_id = text.pad_token_id = padding


def _match(model: nn.Module, checkpoint: Checkpoint) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Find out which floating tensors in the files become which parameters in memory.

    Returns:
        What becomes what, and why the other tensors are not measured.

    Raises:
        CheckpointError: tensors that are converted together do not fit together.
        MeasureError: a parameter has no tensor, or one of another shape.
    """
    layout = Layout(model, {name: info for name, info in checkpoint.items() if info.is_floating})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    unmeasured = dict.fromkeys(layout.unused, f"not used by {type(model).__name__}")
    groups = []
    for group in layout.groups:
        if all(name in parameters for name in group.targets):
            _check_shapes(group, parameters, model)
            groups.append(group)
        else:
            why = "a buffer" if buffers & group.targets.keys() else "no parameter of the model"
            unmeasured |= dict.fromkeys((source.name for source in group.sources), why)
    found = {parameters[name] for group in groups for name in group.targets}
    lost = [name for name, p in model.named_parameters() if p not in found]
    if lost:
        raise MeasureError(
            f"{checkpoint.folder} has no tensors for {len(lost)} parameters of "
            f"{type(model).__name__} ({', '.join(lost[:4])}). Only a whole model can be measured: "
            "transformers would fill in random numbers."
        )
    return tuple(groups), unmeasured


def _check_shapes(group: Group, parameters: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Raise MeasureError if the files hold something of another shape than the model."""
    for name, shape in group.targets.items():
        needed = parameters[name].shape
        if shape != needed:
            held = "has shape" if group.is_plain else f"would become {name} of shape"
            raise MeasureError(
                f"{group.described()} in {group.sources[0].file} {held} {list(shape)}, but by "
                f"config.json {type(model).__name__} has {list(needed)} there. Weights and "
                "configuration must belong together."
            )


def _compare(checkpoint: Checkpoint, group: Group, parameters: dict[str, nn.Parameter]) -> None:
    """Raise MeasureError if parameters do not hold the very numbers of the tensors in the files.

    Raises:
        CheckpointError: a conversion does more than move them.
    """
    some = next(iter(group.targets))
    stored = [checkpoint.load(source.name).to(parameters[some].dtype) for source in group.sources]
    if group.is_plain:
        same = torch.equal(stored[0], parameters[some].detach())
    else:
        same = _are_moved(stored, group, parameters)
    if not same:
        raise MeasureError(
            f"{group.described()} in {group.sources[0].file} is not what the model holds as "
            f"{', '.join(group.targets)}: transformers changes this checkpoint while loading in a "
            "way that is not known, so it cannot be measured."
        )


def _are_moved(stored: Sequence[Tensor], group: Group, parameters: dict[str, nn.Parameter]) -> bool:
    """Return whether every number in memory stands in the files where it is said to come from."""
    flat = torch.cat([tensor.reshape(-1) for tensor in stored])
    return all(
        torch.equal(flat.take(block.long()), held)
        for name, place in group.places().items()
        for block, held in zip(
            place.reshape(-1).split(BLOCK),
            parameters[name].detach().reshape(-1).split(BLOCK),
            strict=True,
        )
    )
