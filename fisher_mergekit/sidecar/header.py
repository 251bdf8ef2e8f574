"""The sidecar's header: where every number in it comes from.

`header.json` is the commit point of a sidecar. It is written last and withdrawn first, so a folder
whose header speaks of a kind holds all of that kind. A copy of the header without the wall time
stands in the metadata of an unsharded `.safetensors` file, which therefore can travel alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.sidecar.checkpoint import TensorInfo

FORMAT = "fisher_mergekit.sidecar"
FORMAT_VERSION = 1
HEADER_NAME = "header.json"
CHECKSUM_KEY = "checksum"
NONE = "none"
METADATA_KEY = "fisher_mergekit.header"
NOT_DESCRIBED = "not described by "
"""How `unmeasured` begins to say why nothing is stored of a parameter; then comes the kind. Of what
is no parameter it says something else."""


class _Record(BaseModel):
    # Unknown keys are kept: a newer minor version may add some, and those of a kind that stays have
    # to survive that another is written.
    model_config = ConfigDict(frozen=True, extra="allow")


class ModelIdentity(_Record):
    """Which model was measured: the reference as typed, its revision and its architecture."""

    reference: str
    revision: str | None = None
    architecture: str


class WeightRecord(_Record):
    """One tensor of the measured checkpoint: its dtype and shape there, and its digest."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, info: TensorInfo) -> WeightRecord:
        """Return the record of a tensor in the files; of a large one samples are read."""
        return cls(dtype=info.dtype, shape=info.shape, digest=info.digest())


class PrecisionRecord(_Record):
    """One stored tensor: xxh3-128 of its bytes, and what can be said of it without reading it.

    Attributes:
        asymmetry: of a factor that is a matrix A: max |A - Aᵀ| / max |A|.
    """

    checksum: str
    sum_of_squares: float
    asymmetry: float | None = None


class FactorNames(_Record):
    """Which stored tensors are the precision of one weight: a Kronecker product outputs ⊗ inputs.

    A factor is a symmetric matrix, or the diagonal of one. Weights that get the same inputs share
    their factor.

    Attributes:
        inputs: `[…, i, i]` or `[…, i]`, with the weight's leading axes.
        outputs: `[…, o, o]` or `[…, o]`; None stands for the identity.
        input_axis: the weight's axis along which its inputs run, -1 or -2.
    """

    inputs: str
    outputs: str | None = None
    input_axis: Literal[-1, -2] = -1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return (self.inputs,) if self.outputs is None else (self.inputs, self.outputs)

    def misfit(self, weight: Sequence[int], stored: Mapping[str, Sequence[int]]) -> str | None:
        """Say which factor has another shape than a weight of this shape needs, if one has.

        Args:
            weight: its shape.
            stored: the shape of every stored tensor.
        """
        if len(weight) < 2:
            return f"a weight of shape {list(weight)} has no inputs and outputs"
        *lead, first, last = weight
        inputs, outputs = (last, first) if self.input_axis == -1 else (first, last)
        for role, name, width in (
            ("input", self.inputs, inputs),
            ("output", self.outputs, outputs),
        ):
            if name is None:
                continue
            if name not in stored:
                return f"{name} is missing"
            if tuple(stored[name]) not in ((*lead, width, width), (*lead, width)):
                return (
                    f"{name} has shape {list(stored[name])}, but its weight {list(weight)} has "
                    f"{width} {role}s"
                )
        return None


class Settings(_Record):
    """How a kind was measured. Two sidecars are comparable if these agree where it matters.

    What counts data is None where there was none to count, but a training's own statistics.
    A kind that asks nobody what is predicted has `NONE` for estimator, unit and likelihood.
    """

    estimator: str
    unit: str
    likelihood: str
    examples: int | None = None
    examples_requested: int | None = None
    tokens: int | None = None
    max_length: int | None = None
    mask_prompt: bool = False
    seed: int | None = None
    compute_dtype: str = "float32"
    dtype: str = "float32"
    attn_implementation: str | None = None


class Measurement(_Record):
    """Everything about one kind in a sidecar.

    Attributes:
        weights: the weights that it describes.
        tensors: what is stored. Without `factors`, one tensor a weight, of its name and shape.
        factors: by weight, which stored tensors describe it.
        unmeasured: other floating tensors of the model, and why nothing is stored of them.
    """

    settings: Settings
    calibration: dict[str, Any]
    weights: dict[str, WeightRecord]
    tensors: dict[str, PrecisionRecord]
    factors: dict[str, FactorNames] = {}
    unmeasured: dict[str, str] = {}
    versions: dict[str, str] = {}
    wall_seconds: float | None = None


class Header(_Record):
    """The whole of `header.json`."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    model: ModelIdentity
    kinds: dict[str, Measurement]

    def to_json(self, *, wall_time: bool = True, indent: int | None = 2) -> str:
        """Serialise with sorted keys, so that the same content gives the same bytes."""
        content = self.model_dump(mode="json", exclude_none=True)
        if not wall_time:
            for measurement in content["kinds"].values():
                measurement.pop("wall_seconds", None)
        content[CHECKSUM_KEY] = _checksum(content)
        return json.dumps(content, indent=indent, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Header:
        """Parse and check a header.

        Raises:
            SidecarError: not JSON, not a header of ours, of another format version, or damaged.
        """
        try:
            content = json.loads(text)
            found = content.get("format") if isinstance(content, dict) else None
            if found != FORMAT:
                raise SidecarError(f"{where} is not a sidecar header (its format is {found!r}).")
            if content.get("format_version") != FORMAT_VERSION:
                raise SidecarError(
                    f"{where} has sidecar format version {content.get('format_version')}; this "
                    f"fisher_mergekit reads version {FORMAT_VERSION}. Install the version that "
                    "wrote it, or measure the model again."
                )
            if content.pop(CHECKSUM_KEY, None) != _checksum(content):
                raise SidecarError(
                    f"{where} is corrupt: its content is not what was written (checksum differs)."
                )
            return cls.model_validate(content)
        except (ValueError, AttributeError, ValidationError, RecursionError) as error:
            raise SidecarError(f"{where} is not a readable sidecar header ({error}).") from error


def _checksum(content: dict[str, Any]) -> str:
    """Return xxh3-128 of all but the checksum and wall times: a flipped digit is a wrong merge."""
    kinds = {
        kind: {key: value for key, value in measurement.items() if key != "wall_seconds"}
        for kind, measurement in content.get("kinds", {}).items()
    }
    text = json.dumps(
        {**content, "kinds": kinds}, sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    return xxhash.xxh3_128_hexdigest(text.encode())
