"""Pictures and masks from disk to tensors. JPEG by torchvision's decoder (as fast as OpenCV's, and it notices truncated
files), everything else by Pillow; torchvision's PNG decoder kills the process on a damaged file (torchvision 0.29), so
it gets only PNGs of 16 bits, which Pillow would cut to 8, after they are found whole.

Rules for a picture: the result is RGB, uint8, (3, H, W).
- EXIF orientation is applied (`exif=False`: not), for JPEG, PNG and the rest alike; to TIFF Pillow always applies it.
- Grey and black-and-white are repeated into three channels, a palette is looked up, CMYK is converted.
- Alpha is dropped, as Pillow's convert and OpenCV do; what is stored under transparent pixels shows.
- 16 bits: the full range 0..65535 is mapped to 0..255 with rounding (Pillow would clip at 255).
- Of an animation the first frame is taken. Floating-point and 32-bit integer pixels are refused by name.
- A file that is empty, truncated or no image is a DataError that names it.
"""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from .errors import DataError

_EXIF_ORIENTATION = 0x0112


def read_image(path: str | os.PathLike[str], *, exif: bool = True, deep_as_float: bool = False) -> Tensor:
    """One picture as RGB.

    Returns: (3, H, W), uint8 0..255; with deep_as_float=True a 16-bit file is float32 0..1 with all its bits.
    Raises DataError with the file and the reason. Memory may be laid out channels last.
    """
    data = _read_bytes(path)
    try:
        image = _decode(data, exif)
    except DataError as error:
        raise DataError(f'{path}: {error}') from None
    if image.dtype == torch.uint16:
        if deep_as_float:
            return image.to(torch.float32).div_(65535.0)
        image = image.to(torch.int32).add_(128).floor_divide_(257).to(torch.uint8)
    return image


def read_alpha(path: str | os.PathLike[str], *, exif: bool = True) -> Tensor:
    """Where a picture is not transparent: (1, H, W) uint8, 255 or 0 (opaque from half on).

    Raises DataError for a picture without transparency, and as `read_image`.
    """
    with _pillow(_read_bytes(path), str(path)) as picture:
        picture = _rotated(picture, exif)
        if not picture.has_transparency_data:
            raise DataError(f'{path}: has no transparency; holes to be filled must be transparent (PNG or WebP)')
        alpha = np.asarray(picture.convert('RGBA'))[..., 3]
    return torch.from_numpy(np.where(alpha >= 128, 255, 0).astype(np.uint8))[None]


def read_mask(path: str | os.PathLike[str], *, exif: bool = True) -> np.ndarray:
    """One mask as stored: (H, W) integers for one channel or a palette (the indices), else (H, W, 3) uint8 RGB."""
    data = _read_bytes(path)
    with _pillow(data, str(path)) as picture:
        picture = _rotated(picture, exif)
        if picture.mode == '1':
            return np.asarray(picture, dtype=np.uint8)
        if picture.mode in ('L', 'P', 'I') or picture.mode.startswith('I;16'):
            return np.asarray(picture)
        if picture.mode in ('LA', 'PA'):
            return np.asarray(picture)[..., 0]
        if picture.mode in ('RGB', 'RGBA'):
            return np.asarray(picture)[..., :3]
        raise DataError(f'{path}: a mask has class ids in one channel, a palette or RGB, but got mode {picture.mode!r}')


def probe(path: str | os.PathLike[str], *, exif: bool = True) -> tuple[int, int]:
    """Size (height, width) after EXIF rotation, from the header. A file whose end looks cut off is decoded to be sure.

    Raises DataError for a missing, empty, truncated or unreadable file.
    """
    try:
        with open(path, 'rb') as file:
            head = file.read(8)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            tail = file.read()
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                with Image.open(file) as picture:
                    width, height = picture.size
                    # Pillow turns a TIFF by itself, and decodes a PNG without EXIF to look for it at the end.
                    asked = picture.format != 'PNG' or 'exif' in picture.info or b'eXIf' in tail
                    asked = asked and exif and picture.format != 'TIFF'
                    turned = asked and picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:
        height, width = read_image(path, exif=exif).shape[-2:]  # names the reason, or the header was merely odd
        return int(height), int(width)
    whole = tail.endswith(b'\xff\xd9') if head.startswith(b'\xff\xd8') else tail[-8:-4] == b'IEND'
    if not whole:
        read_image(path, exif=exif)
    return (width, height) if turned else (height, width)


def _read_bytes(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror or error})') from None
    if data.size == 0:
        raise DataError(f'{path}: empty file (0 bytes)')
    return data


def _decode(data: np.ndarray, exif: bool) -> Tensor:
    """RGB as uint8 or uint16, (3, H, W). Pillow has the last word on what torchvision's decoders refuse."""
    if data[:2].tobytes() == b'\xff\xd8' or _whole_deep_png(data):
        try:
            return decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=exif)
        except RuntimeError:
            pass
    with _pillow(data, '') as picture:
        picture = _rotated(picture, exif)
        if picture.mode.startswith('I;16'):
            deep = torch.from_numpy(np.asarray(picture).astype(np.int32)).to(torch.uint16)
            return deep.expand(3, -1, -1)
        if picture.mode in ('I', 'F'):
            kind = '32-bit integer' if picture.mode == 'I' else 'floating-point'
            raise DataError(f'{kind} pixels have no stated range; convert the file to 8 or 16 bits')
        pixels = np.array(picture.convert('RGB'))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _whole_deep_png(data: np.ndarray) -> bool:
    """Whether this is a PNG of 16 bits whose checksums agree and whose pixels can be inflated."""
    file = data.tobytes() if data[:8].tobytes() == b'\x89PNG\r\n\x1a\n' and data[24:25] == 16 else b''
    place, packed = 8, []
    while place + 12 <= len(file):
        length, kind = struct.unpack_from('>I4s', file, place)
        body = file[place + 8 : place + 8 + length]
        if file[place + 8 + length : place + 12 + length] != struct.pack('>I', zlib.crc32(kind + body)):
            return False
        if kind == b'IDAT':
            packed.append(body)
        elif kind == b'IEND':
            inflater = zlib.decompressobj()
            try:
                inflater.decompress(b''.join(packed))
            except zlib.error:
                return False
            return inflater.eof
        place += 12 + length
    return False


class _pillow:
    """An open, fully loaded Pillow image; whatever Pillow raises becomes a DataError with `prefix` and a reason."""

    def __init__(self, data: np.ndarray, prefix: str) -> None:
        where = f'{prefix}: ' if prefix else ''
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                self._picture = Image.open(io.BytesIO(data.tobytes()))
                self._picture.load()
        except Image.UnidentifiedImageError:
            raise DataError(f'{where}is not an image in a known format') from None
        except Image.DecompressionBombError as error:
            raise DataError(f'{where}{error}') from None
        except Exception as error:
            text = ' '.join(str(error).split()) or type(error).__name__
            cut = any(word in text.lower() for word in ('truncated', 'incomplete', 'unpack', 'end of file'))
            raise DataError(f'{where}{"truncated file" if cut else "cannot be decoded"} ({text})') from None

    def __enter__(self) -> Image.Image:
        return self._picture

    def __exit__(self, *_: object) -> None:
        self._picture.close()


def _rotated(picture: Image.Image, exif: bool) -> Image.Image:
    if exif and picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        return ImageOps.exif_transpose(picture)
    return picture
