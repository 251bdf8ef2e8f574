"""Pictures of the calibration data, to pixels, by the model's own image processor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig

from fisher_mergekit.errors import CalibrationError, CheckpointError


def read_image_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's image processor.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing files, missing libraries, remote code
        raise CheckpointError(
            f"{folder} has no image processor that transformers can read: {error}"
        ) from None


def pixels(image: Any, processor: Any, config: PretrainedConfig) -> Tensor:
    """Return the `[1, c, h, w]` pixels of one picture.

    Args:
        image: a path, a PIL image, or bytes, as `datasets` gives them: `{bytes: …, path: …}`.
        processor: of the model; None if it reads no pictures.
        config: of the model.

    Raises:
        CalibrationError: it is no picture, or not one that the processor takes.
    """
    if processor is None:
        raise CalibrationError("this model reads text; name a text column, `text:`.")
    picture = _opened(image).convert("L" if getattr(config, "num_channels", 3) == 1 else "RGB")
    try:
        values: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
    except Exception as error:  # whatever its code stumbles over
        raise CalibrationError(f"the model's image processor refuses it: {error}") from None
    return values


def _opened(image: Any) -> Any:
    """Return the PIL image."""
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("pictures need Pillow: pip install pillow") from None
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, bytes):
            return Image.open(io.BytesIO(image))
        if isinstance(image, str):
            return Image.open(image)
    except OSError as error:
        raise CalibrationError(f"this picture cannot be read: {error}") from None
    raise CalibrationError(
        f"expected a picture: a path, bytes, or an image of `datasets`, got {image!r}."
    )
