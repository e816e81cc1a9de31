"""Conversion of images: files, PIL images, arrays and tensors to upright RGB in [0, 1], and back.

Every image that enters the library is converted here, so that all entry points follow the same rules.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

from dall3.errors import require

Source = str | os.PathLike[str] | bytes | BinaryIO  # an image file: its path, its bytes, or the open file
ImageLike = Source | Image.Image | np.ndarray | Tensor
ImageInput = ImageLike | Sequence[ImageLike]  # one image, or a list of images of the same size
OutputType = Literal["pil", "np", "pt"]
# PIL images; an array, float32 (n, height, width, 3) in [0, 1]; or a tensor, float32 (n, 3, height, width) in [0, 1].
Images = list[Image.Image] | np.ndarray | Tensor

# Pillow's other readers are disabled: the one for EPS, for example, runs Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 8192 * 8192  # decoding and converting takes about 20 bytes per pixel
UNNAMED = "the image"  # in error messages, for an image without a path
EXPECTED = "float in [0, 1] or uint8, (n, 3, height, width) or (n, height, width, 3)"

# The transpositions that undo the values of EXIF's orientation tag.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file and return it as stored, with its mode and metadata.

    source: path, bytes or open binary file of a PNG, JPEG, WebP, GIF, BMP or TIFF. If the file has several frames, the
    first one is read.
    name: the name of the image in error messages (default: its path).
    max_pixels: upper bound of width · height, checked before decoding.

    Raises ValueError for a file that is not such an image, is damaged or has too many pixels, and OSError
    (FileNotFoundError, for example) for a path that cannot be opened.
    """
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return decode(file, name or os.fspath(source), max_pixels)
    return decode(io.BytesIO(source) if isinstance(source, bytes) else source, name or UNNAMED, max_pixels)


def decode(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Decode an open image file. Arguments and errors are those of `open_image`."""
    with open_checked(name):
        image = Image.open(file, formats=FORMATS)
    check_size(image, name, max_pixels)
    with open_checked(name):
        image.load()
    return image


@contextmanager
def open_checked(name: str) -> Iterator[None]:
    """Context manager that converts the many types of errors that Pillow raises for a damaged image to ValueError."""
    expected = "not a readable image; expected a PNG, JPEG, WebP, GIF, BMP or TIFF"
    try:
        yield
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has too many pixels; use a smaller image") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: {expected}") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{name}: {expected} ({reason})") from None


def check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise ValueError for an image of more than `max_pixels` pixels."""
    width, height = image.size
    require(width * height > 0, f"{name} has {width}×{height} pixels; expected at least one")
    require(width * height <= max_pixels, f"{name} has {width}×{height} pixels; expected at most {max_pixels:,}")


def to_rgb(image: Image.Image, name: str = UNNAMED) -> Image.Image:
    """Convert a PIL image to upright RGB of 8 bits.

    The image is rotated as its EXIF data says, transparent pixels are composited on white, 16-bit values are scaled
    from [0, 65535] and floating point values from [0, 1]. The result has no metadata.

    >>> to_rgb(Image.new("RGBA", (2, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)

    Raises ValueError for an image that is damaged, has too many pixels, or whose values have no known range.
    """
    check_size(image, name, MAX_PIXELS)
    with open_checked(name):
        image.load()
    transpose = UPRIGHT.get(orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = scale_to_8_bits(image, name)
    with open_checked(name):
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb if transpose is None else rgb.transpose(transpose)


def orientation(image: Image.Image) -> int:
    """The value of EXIF's orientation tag; 1 (upright) if there is none or the EXIF data cannot be read."""
    value = None
    with suppress(Exception):
        value = image.getexif().get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) else 1


def scale_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale a greyscale image of more than 8 bits to mode "L". Raises ValueError if its range is not known."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        in_range = low >= 0 and high <= 1  # false for NaN
        require(in_range, f"{name} has floating point pixels from {low:.3g} to {high:.3g}; expected values in [0, 1]")
        white = 1.0
    else:
        known = image.mode != "I" or image.format == "PNG"  # some versions of Pillow open 16-bit PNGs as "I"
        require(known, f"{name} has 32-bit integer pixels, whose range is not known; expected 8 or 16 bits, or floats")
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample of a TIFF
        white = 2.0**bits - 1
    grey = (values.astype(np.float32) * np.float32(255 / white)).round().astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def read_rgb(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to upright RGB of 8 bits: `open_image`, then `to_rgb`. Raises the errors of both."""
    name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else UNNAMED)
    return to_rgb(open_image(source, name, max_pixels), name)


def to_tensor(images: ImageInput) -> Tensor:
    """Convert an image, or a list of images of one size, to a tensor, float32 (n, 3, height, width) in [0, 1].

    images: path, bytes or open binary file of an image file; PIL image; array or tensor of floats in [0, 1] or of
    uint8, (3, height, width), (height, width, 3), (n, 3, height, width) or (n, height, width, 3). Files and PIL images
    are converted as `to_rgb` does. A tensor stays on its device.

    >>> to_tensor(np.zeros((8, 6, 3), np.uint8)).shape
    torch.Size([1, 3, 8, 6])

    Raises ValueError for anything else, images of several sizes and values outside of the range, and OSError for a
    path that cannot be opened.
    """
    if isinstance(images, list | tuple):
        require(bool(images), "an empty list of images; expected at least one")
        nested = any(isinstance(image, list | tuple) for image in images)
        require(not nested, "a list of lists of images; expected a list of images")
        tensors = [to_tensor(image) for image in images]
        sizes = {(tensor.shape[-1], tensor.shape[-2]) for tensor in tensors}
        require(len(sizes) == 1, f"the images have several sizes, {sorted(sizes)}; pass them one by one")
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    is_file = isinstance(images, str | os.PathLike | bytes) or hasattr(images, "read")
    if is_file or isinstance(images, Image.Image):
        rgb = to_rgb(images) if isinstance(images, Image.Image) else read_rgb(cast(Source, images))
        return from_uint8(torch.from_numpy(np.array(rgb))[None].permute(0, 3, 1, 2))
    if isinstance(images, np.ndarray):
        kind = images.dtype
        require(kind.kind == "f" or kind == np.uint8, f"images are {kind} {images.shape}; expected {EXPECTED}")
        # A copy with native byte order and positive strides, which torch requires.
        images = torch.from_numpy(np.array(images, np.float32 if kind.kind == "f" else np.uint8, order="C"))
    if not isinstance(images, Tensor):
        raise ValueError(f"{type(images).__name__} is not an image; expected a path, a PIL image, an array or a tensor")
    tensor = channels_first(images)
    if tensor.dtype == torch.uint8:
        return from_uint8(tensor)
    low, high = (float(bound) for bound in tensor.aminmax())
    require(low >= 0 and high <= 1, f"images run from {low:.3g} to {high:.3g}; expected values in [0, 1]")
    return tensor.float()


def from_uint8(images: Tensor) -> Tensor:
    """Convert pixels in [0, 255] to float32 in [0, 1]."""
    return images.float().div_(255)


def channels_first(images: Tensor) -> Tensor:
    """Convert a tensor in any layout that `to_tensor` accepts to (n, 3, height, width). Raises ValueError otherwise."""
    shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    found = f"images are {kind} {shape}"
    valid = images.is_floating_point() or images.dtype == torch.uint8
    valid = valid and len(shape) in (3, 4) and 0 not in shape and 3 in (shape[-3], shape[-1])
    require(valid, f"{found}; expected {EXPECTED}")
    both = shape[-3] == shape[-1] == 3
    require(not both, f"{found}, which is ambiguous: either 3 may be the channels; pass PIL images")
    images = images if shape[-3] == 3 else images.movedim(-1, -3)
    return images if len(shape) == 4 else images[None]


def to_pil(images: Images) -> list[Image.Image]:
    """Convert images to PIL images of 8 bits.

    images: a tensor, float (n, 3, height, width) in [0, 1], or an array, float (n, height, width, 3) in [0, 1]; values
    outside are clamped. PIL images are returned as they are.
    """
    if isinstance(images, list):
        return images
    images = torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images
    array = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def to_output_type(images: Tensor, output_type: OutputType) -> Images:
    """Convert a tensor, float32 (n, 3, height, width) in [0, 1], to an output type of the pipeline.

    >>> to_output_type(torch.zeros(2, 3, 8, 6), "np").shape
    (2, 8, 6, 3)
    """
    if output_type == "pil":
        return to_pil(images)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def check_output_type(output_type: object) -> None:
    """Raise ValueError for an unknown output type."""
    known = get_args(OutputType)
    require(output_type in known, f"output_type={output_type!r}; expected {' or '.join(map(repr, known))}")


def enlarge(images: Tensor, side: int) -> Tensor:
    """Resize square images, float (n, 3, …) in [0, 1], to `side` pixels with antialiased bicubic interpolation."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def center_crop(images: Tensor) -> Tensor:
    """Crop images (…, height, width) to their largest central square."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def make_grid(rows: list[list[Image.Image]], side: int, gap: int = 4) -> Image.Image:
    """Paste rows of PIL images, each resized to `side` pixels, on a white sheet, `gap` pixels apart."""
    width = max(len(row) for row in rows) * (side + gap) - gap
    grid = Image.new("RGB", (width, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x * (side + gap), y * (side + gap)))
    return grid
