"""Without these, a 16-bit, grey, transparent, rotated or truncated file would be silently wrong or a stack trace."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from densezoo.data import DataError, probe, read_image, read_mask

_ORIENTATION = 0x0112


def pixels(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif', 'gif', 'webp', 'jpg'])
def test_every_format_gives_rgb_uint8(save, photograph, suffix):
    options = {'lossless': True} if suffix == 'webp' else {}
    image = read_image(save(f'a.{suffix}', height=60, width=81, **options))
    assert image.dtype == torch.uint8 and image.shape == (3, 60, 81)
    difference = np.abs(pixels(image).astype(int) - photograph[40:100, 30:111].astype(int)).mean()
    assert difference < {'jpg': 8, 'gif': 12}.get(suffix, 0.01)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_is_applied(tmp_path, photograph, suffix, orientation):
    picture = Image.fromarray(photograph[:60, :80])
    exif = picture.getexif()
    exif[_ORIENTATION] = orientation
    path = tmp_path / f'a.{suffix}'
    picture.save(path, exif=exif)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert('RGB'))
        as_stored = np.asarray(stored.convert('RGB'))
    assert np.abs(pixels(read_image(path)).astype(int) - upright).max() <= 2
    assert np.abs(pixels(read_image(path, exif=False)).astype(int) - as_stored).max() <= 2
    assert probe(path) == upright.shape[:2]
    assert probe(path, exif=False) == as_stored.shape[:2]


def test_grey_and_black_and_white_are_repeated(tmp_path, photograph):
    grey = Image.fromarray(photograph[:40, :50]).convert('L')
    for mode, suffix in (('L', 'png'), ('L', 'jpg'), ('1', 'png')):
        path = tmp_path / f'{mode}.{suffix}'
        grey.convert(mode).save(path, quality=95)
        image = read_image(path)
        assert image.shape == (3, 40, 50)
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert image.max() > 200


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path, photograph, mode):
    colour = Image.fromarray(photograph[:40, :50])
    picture = colour.convert('L').convert('LA') if mode == 'LA' else colour.convert(mode)
    if mode != 'P':
        picture.putalpha(Image.fromarray(np.tile(np.arange(50, dtype=np.uint8), (40, 1))))
    path = tmp_path / 'a.png'
    picture.save(path)
    assert np.array_equal(pixels(read_image(path)), np.asarray(picture.convert('RGB')))


@pytest.mark.parametrize('channels', [3, 4])
def test_16_bits_of_colour_keep_their_range(tmp_path, channels):
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'a.png'), deep)
    image = read_image(tmp_path / 'a.png')
    assert np.array_equal(pixels(image), np.round(deep[..., 2::-1] / 257).astype(np.uint8))
    assert np.abs(pixels(read_image(tmp_path / 'a.png', deep_as_float=True)) - deep[..., 2::-1] / 65535).max() < 1e-6


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_keep_their_range(tmp_path, suffix):
    deep = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    path = tmp_path / f'a.{suffix}'
    Image.fromarray(deep).save(path)
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 64)
    assert np.array_equal(image[1].numpy(), np.round(deep / 257).astype(np.uint8))
    exact = read_image(path, deep_as_float=True)
    assert exact.dtype == torch.float32
    assert np.abs(exact[2].numpy() - deep / 65535).max() < 1e-6


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / 'a.tif'
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(path)
    with pytest.raises(DataError, match=r'a\.tif: floating-point pixels have no stated range'):
        read_image(path)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'webp'])
@pytest.mark.parametrize('part', [0.3, 0.7, 0.98])
def test_a_truncated_file_is_named(save, suffix, part):
    path = save(f'cut.{suffix}')
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    for read in (read_image, probe):
        with pytest.raises(DataError, match=rf'cut\.{suffix}: .*(truncated|cannot be decoded|not an image)') as caught:
            read(path)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['jpg', 'png', 'deep'])
def test_damaged_bytes_never_end_the_process(tmp_path, save, kind):
    path = save(f'a.{kind}') if kind != 'deep' else tmp_path / 'deep.png'
    if kind == 'deep':
        cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16))
    good = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        bad = good.copy()
        bad[generator.integers(2, len(bad), 4)] = generator.integers(0, 256, 4)
        path.write_bytes(bad)
        try:
            assert read_image(path).shape[0] == 3
        except DataError as error:
            assert str(error).startswith(f'{path}: ')
            refused += 1
    assert refused > 20


def test_no_image_no_file_and_an_empty_file_are_named(tmp_path):
    (tmp_path / 'text.png').write_text('hello')
    (tmp_path / 'empty.jpg').touch()
    (tmp_path / 'folder.png').mkdir()
    cases = {
        'text.png': 'is not an image in a known format',
        'empty.jpg': r'empty file \(0 bytes\)',
        'absent.png': 'no such file',
        'folder.png': 'cannot be read',
    }
    for name, reason in cases.items():
        for read in (read_image, probe, read_mask):
            with pytest.raises(DataError, match=f'{name}: {reason}'):
                read(tmp_path / name)


def test_masks_are_read_as_stored(tmp_path):
    ids = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(ids).save(tmp_path / 'grey.png')
    palette = Image.fromarray(ids, mode='P')
    palette.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    palette.save(tmp_path / 'palette.png')
    Image.fromarray(ids.astype(np.uint16) * 300).save(tmp_path / 'deep.png')
    assert np.array_equal(read_mask(tmp_path / 'grey.png'), ids)
    assert np.array_equal(read_mask(tmp_path / 'palette.png'), ids)
    assert np.array_equal(read_mask(tmp_path / 'deep.png'), ids.astype(int) * 300)


def test_trailing_bytes_after_the_picture_are_no_damage(save):
    path = save('a.jpg')
    path.write_bytes(path.read_bytes() + b'\0' * 100)
    assert probe(path) == (60, 80)
