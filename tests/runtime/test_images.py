"""Camera data to pixels: every encoding against pixels written by hand, every refusal, and any bytes at all."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.errors import BadImageError
from mobilevlm_ros.runtime.images import ENCODINGS, decode_compressed, read_image, to_rgb
from mobilevlm_ros.runtime.preprocess import MAX_SIDE

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
# Y, U, V by BT.601, limited range.
YUV_RED, YUV_BLUE = (82, 90, 240), (41, 240, 110)


def image(*rows: list[tuple[int, int, int]]) -> NDArray[np.uint8]:
    return np.array(rows, dtype=np.uint8)


# encoding, bytes, width, height, big-endian, pixels
EXACT: list[tuple[str, bytes, int, int, bool, NDArray[np.uint8]]] = [
    ('rgb8', bytes([255, 0, 0, 1, 2, 3]), 2, 1, False, image([RED, (1, 2, 3)])),
    ('bgr8', bytes([255, 0, 0, 1, 2, 3]), 2, 1, False, image([BLUE, (3, 2, 1)])),
    ('8UC3', bytes([255, 0, 0, 1, 2, 3]), 2, 1, False, image([BLUE, (3, 2, 1)])),
    ('rgba8', bytes([255, 0, 0, 9, 1, 2, 3, 9]), 2, 1, False, image([RED, (1, 2, 3)])),
    ('bgra8', bytes([255, 0, 0, 9, 1, 2, 3, 9]), 2, 1, False, image([BLUE, (3, 2, 1)])),
    ('8UC4', bytes([255, 0, 0, 9, 1, 2, 3, 9]), 2, 1, False, image([BLUE, (3, 2, 1)])),
    ('mono8', bytes([0, 128, 255, 7]), 2, 2, False, image([(0, 0, 0), GREY], [(255, 255, 255), (7, 7, 7)])),
    ('8UC1', bytes([0, 128]), 2, 1, False, image([(0, 0, 0), GREY])),
    ('mono16', bytes([0x34, 0x80, 0xFF, 0x00]), 2, 1, False, image([GREY, (0, 0, 0)])),
    ('mono16', bytes([0x80, 0x34, 0x00, 0xFF]), 2, 1, True, image([GREY, (0, 0, 0)])),
    ('rgb16', bytes([9, 255, 9, 0, 9, 1]), 1, 1, False, image([(255, 0, 1)])),
    ('rgb16', bytes([255, 9, 0, 9, 1, 9]), 1, 1, True, image([(255, 0, 1)])),
    ('bgr16', bytes([9, 255, 9, 0, 9, 1]), 1, 1, False, image([(1, 0, 255)])),
    ('rgba16', bytes([9, 255, 9, 0, 9, 1, 9, 9]), 1, 1, False, image([(255, 0, 1)])),
    ('bgra16', bytes([9, 255, 9, 0, 9, 1, 9, 9]), 1, 1, False, image([(1, 0, 255)])),
]


@pytest.mark.parametrize(
    ('encoding', 'data', 'width', 'height', 'is_bigendian', 'expected'), EXACT, ids=[f'{e[0]}-{e[4]}' for e in EXACT]
)
def test_packed_encodings_give_the_pixels_of_the_table(
    encoding: str, data: bytes, width: int, height: int, is_bigendian: bool, expected: NDArray[np.uint8]
) -> None:
    step = len(data) // height

    pixels = to_rgb(data, encoding=encoding, height=height, width=width, step=step, is_bigendian=is_bigendian)

    np.testing.assert_array_equal(pixels, expected)


def yuv422(first_luma: bool) -> bytes:
    """Two pixels of red, two of blue."""
    result: list[int] = []
    for y, u, v in (YUV_RED, YUV_BLUE):
        result += [y, u, y, v] if first_luma else [u, y, v, y]
    return bytes(result)


@pytest.mark.parametrize(
    ('encoding', 'first_luma'), [('yuv422', False), ('uyvy', False), ('yuv422_yuy2', True), ('yuyv', True)]
)
def test_yuv422_in_both_orders(encoding: str, first_luma: bool) -> None:
    pixels = to_rgb(yuv422(first_luma), encoding=encoding, height=1, width=4, step=8)

    np.testing.assert_allclose(pixels[0].astype(int), [RED, RED, BLUE, BLUE], atol=3)


@pytest.mark.parametrize('encoding', ['nv12', 'nv21'])
def test_semi_planar_yuv(encoding: str) -> None:
    luma = [YUV_RED[0], YUV_RED[0], YUV_BLUE[0], YUV_BLUE[0]] * 2
    u_first = encoding == 'nv12'
    chroma = [value for _, u, v in (YUV_RED, YUV_BLUE) for value in ((u, v) if u_first else (v, u))]
    data = bytes(luma + chroma)

    pixels = to_rgb(data, encoding=encoding, height=2, width=4, step=4)

    np.testing.assert_allclose(pixels.astype(int), [[RED, RED, BLUE, BLUE]] * 2, atol=3)


def bayer(pattern: str, colour: Callable[[int, int], tuple[int, int, int]], height: int, width: int) -> bytes:
    """What a sensor behind this pattern sees."""
    rows = [[colour(y, x)['rgb'.index(pattern[(y % 2) * 2 + x % 2])] for x in range(width)] for y in range(height)]
    return np.array(rows, dtype=np.uint8).tobytes()


@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
@pytest.mark.parametrize(('height', 'width'), [(3, 3), (4, 6), (5, 3)])
def test_bayer_of_one_colour_is_that_colour(pattern: str, height: int, width: int) -> None:
    data = bayer(pattern, lambda y, x: (200, 100, 50), height, width)

    pixels = to_rgb(data, encoding=f'bayer_{pattern}8', height=height, width=width, step=width)

    np.testing.assert_array_equal(pixels, np.full((height, width, 3), (200, 100, 50)))


@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
def test_bayer_of_two_colours_is_right_away_from_the_edge(pattern: str) -> None:
    data = bayer(pattern, lambda y, x: RED if x < 6 else BLUE, 8, 12)

    pixels = to_rgb(data, encoding=f'bayer_{pattern}8', height=8, width=12, step=12)

    np.testing.assert_array_equal(pixels[:, :4], np.full((8, 4, 3), RED))
    np.testing.assert_array_equal(pixels[:, 8:], np.full((8, 4, 3), BLUE))


@pytest.mark.parametrize('is_bigendian', [False, True])
@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
def test_bayer_of_16_bits_keeps_the_upper_byte(pattern: str, is_bigendian: bool) -> None:
    values = np.frombuffer(bayer(pattern, lambda y, x: (200, 100, 50), 4, 4), np.uint8).astype(np.uint16) * 256 + 77
    data = values.astype('>u2' if is_bigendian else '<u2').tobytes()

    pixels = to_rgb(data, encoding=f'bayer_{pattern}16', height=4, width=4, step=8, is_bigendian=is_bigendian)

    np.testing.assert_array_equal(pixels, np.full((4, 4, 3), (200, 100, 50)))


def geometry(encoding: str, height: int = 4, width: int = 6) -> tuple[int, int]:
    """Rows and bytes of a row of an image without padding."""
    if encoding in ('nv12', 'nv21'):
        return height * 3 // 2, width
    n_bytes = 2 if encoding.endswith('16') else 1
    prefixes = {'rgba': 4, 'bgra': 4, 'rgb': 3, 'bgr': 3, 'bayer': 1, 'mono': 1, 'yu': 2, 'uy': 2}
    channels = next(n for prefix, n in prefixes.items() if encoding.startswith(prefix))
    return height, width * channels * n_bytes


PLAIN = [encoding for encoding in ENCODINGS if not encoding.startswith('8UC')]


@pytest.mark.parametrize('padding', [1, 3, 64])
@pytest.mark.parametrize('encoding', PLAIN)
def test_padding_at_the_end_of_rows_does_not_matter(encoding: str, padding: int) -> None:
    n_rows, row_bytes = geometry(encoding)
    rows = np.random.default_rng(0).integers(0, 256, (n_rows, row_bytes), dtype=np.uint8)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xAA)

    tight = to_rgb(rows.tobytes(), encoding=encoding, height=4, width=6, step=row_bytes)
    loose = to_rgb(padded.tobytes(), encoding=encoding, height=4, width=6, step=row_bytes + padding)
    last_row_short = to_rgb(padded.tobytes()[:-padding], encoding=encoding, height=4, width=6, step=row_bytes + padding)

    np.testing.assert_array_equal(loose, tight)
    np.testing.assert_array_equal(last_row_short, tight)


@pytest.mark.parametrize('encoding', PLAIN)
def test_every_encoding_gives_pixels_of_the_right_shape(encoding: str) -> None:
    n_rows, row_bytes = geometry(encoding)

    pixels = to_rgb(bytes(n_rows * row_bytes), encoding=encoding, height=4, width=6, step=row_bytes)

    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize('encoding', ['rgb8', 'mono8', 'mono16', 'nv12'])
def test_the_pixels_are_a_copy(encoding: str) -> None:
    n_rows, row_bytes = geometry(encoding)
    data = bytearray(n_rows * row_bytes)

    pixels = to_rgb(data, encoding=encoding, height=4, width=6, step=row_bytes)
    before = pixels.copy()
    data[:] = b'\xff' * len(data)

    np.testing.assert_array_equal(pixels, before)
    assert pixels.flags.writeable


GOOD: dict[str, Any] = {'encoding': 'rgb8', 'height': 2, 'width': 2, 'step': 6, 'data': bytes(12)}


@pytest.mark.parametrize(
    ('wrong', 'reason'),
    [
        ({'step': 5}, 'step is 5 bytes'),
        ({'step': 0}, 'step is 0 bytes'),
        ({'data': bytes(11)}, '11 bytes of data'),
        ({'data': b''}, '0 bytes of data'),
        ({'data': bytes(13)}, '13 bytes of data'),
        ({'height': 0}, '2x0 pixels'),
        ({'width': 0}, '0x2 pixels'),
        ({'height': -1}, '2x-1 pixels'),
        ({'width': MAX_SIDE + 1}, f'{MAX_SIDE + 1}x2 pixels'),
        ({'height': 2**32 - 1}, 'pixels'),
        ({'step': 2**32 - 1}, 'bytes were expected'),
        ({'encoding': 'rgb24'}, "unsupported image encoding 'rgb24'"),
        ({'encoding': ''}, "unsupported image encoding ''"),
        ({'encoding': 'RGB8'}, 'Supported are: rgb8'),
        ({'encoding': '32FC1'}, 'depth image'),
        ({'encoding': '16UC1'}, 'depth image'),
        ({'encoding': 'yuv422', 'width': 3}, 'shares colour'),
        ({'encoding': 'nv12', 'width': 3}, 'shares colour'),
        ({'encoding': 'nv21', 'height': 3}, 'shares colour'),
        ({'encoding': 'bayer_rggb8', 'height': 2, 'width': 3, 'step': 3, 'data': bytes(6)}, 'at least 3x3'),
        ({'encoding': 'bayer_grbg16', 'height': 3, 'width': 1, 'step': 2, 'data': bytes(6)}, 'at least 3x3'),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_the_reason(wrong: dict[str, Any], reason: str) -> None:
    fields = {**GOOD, **wrong}

    with pytest.raises(BadImageError, match=reason):
        to_rgb(fields.pop('data'), **fields)


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=200),
    encoding=st.sampled_from(ENCODINGS) | st.text(max_size=8),
    height=st.integers(0, 9) | st.integers(-(2**31), 2**32),
    width=st.integers(0, 9) | st.integers(-(2**31), 2**32),
    step=st.integers(0, 40) | st.integers(0, 2**32),
    is_bigendian=st.booleans(),
)
def test_any_fields_give_pixels_or_bad_image(
    data: bytes, encoding: str, height: int, width: int, step: int, is_bigendian: bool
) -> None:
    try:
        pixels = to_rgb(data, encoding=encoding, height=height, width=width, step=step, is_bigendian=is_bigendian)
    except BadImageError as error:
        assert str(error)
    else:
        assert pixels.shape == (height, width, 3)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), encoding=st.sampled_from(ENCODINGS), height=st.integers(1, 7), width=st.integers(1, 7))
def test_images_of_the_right_size_are_read_unless_the_shape_is_impossible(
    data: st.DataObject, encoding: str, height: int, width: int
) -> None:
    if encoding.startswith('8UC'):
        n_rows, row_bytes = height, width * int(encoding[-1])
    else:
        n_rows, row_bytes = geometry(encoding, height, width)
    raw = data.draw(st.binary(min_size=n_rows * row_bytes, max_size=n_rows * row_bytes))
    subsampled = encoding.startswith(('nv', 'yu', 'uy'))
    impossible = (
        (subsampled and width % 2 == 1)
        or (encoding.startswith('nv') and height % 2 == 1)
        or (encoding.startswith('bayer') and min(height, width) < 3)
    )
    if impossible:
        with pytest.raises(BadImageError):
            to_rgb(raw, encoding=encoding, height=height, width=width, step=row_bytes)
    else:
        pixels = to_rgb(raw, encoding=encoding, height=height, width=width, step=row_bytes)
        assert pixels.shape == (height, width, 3)


# -- compressed ---------------------------------------------------------------------------------------------------


def encoded(pixels: NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return photo


@pytest.mark.parametrize(('kind', 'options'), [('PNG', {}), ('WEBP', {'lossless': True})])
def test_lossless_formats_give_the_pixels_back(picture: NDArray[np.uint8], kind: str, options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(decode_compressed(encoded(picture, kind, **options)), picture)


def test_jpeg_gives_nearly_the_pixels_back() -> None:
    ys, xs = np.mgrid[0:48, 0:64]
    pixels = np.stack((xs * 4, ys * 4, np.full_like(xs, 90)), axis=-1).astype(np.uint8)

    decoded = decode_compressed(encoded(pixels, 'JPEG', quality=95), 'bgr8; jpeg compressed bgr8')

    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_a_grey_image_becomes_rgb() -> None:
    decoded = decode_compressed(encoded(np.full((3, 4), 77, np.uint8), 'PNG'))

    np.testing.assert_array_equal(decoded, np.full((3, 4, 3), 77))


def test_an_alpha_channel_is_dropped() -> None:
    decoded = decode_compressed(encoded(np.full((2, 2, 4), (1, 2, 3, 255), np.uint8), 'PNG'))

    np.testing.assert_array_equal(decoded, np.full((2, 2, 3), (1, 2, 3)))


def test_a_16_bit_png_keeps_the_upper_byte() -> None:
    values = np.array([[0x0000, 0x80FF, 0xFFFF]], dtype=np.uint16)

    decoded = decode_compressed(encoded(values, 'PNG'))

    np.testing.assert_array_equal(decoded[0, :, 0], [0x00, 0x80, 0xFF])
    assert decoded.shape == (1, 3, 3)


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter

    decoded = decode_compressed(encoded(pixels, 'JPEG', exif=exif))

    assert decoded.shape == (32, 16, 3)
    assert decoded[:12].mean() < 20
    assert decoded[20:].mean() > 235


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.7, 0.97])
def test_a_truncated_image_is_refused(picture: NDArray[np.uint8], kind: str, share: float) -> None:
    data = encoded(picture, kind)

    with pytest.raises(BadImageError, match='no readable'):
        decode_compressed(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', 'empty'),
        (b'\0' * 100, 'no readable JPEG, PNG or WebP'),
        (b'\xff\xd8\xff\xe0garbage', 'no readable'),
        (b'\x89PNG\r\n\x1a\n', 'no readable'),
        (b'RIFF\x10\0\0\0WEBPVP8 ', 'no readable'),
        (b'<html>', 'no readable'),
    ],
    ids=['empty', 'zeros', 'jpeg start', 'png start', 'webp start', 'html'],
)
def test_what_is_no_image_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_compressed(data, 'jpeg')


def test_other_image_formats_are_refused(picture: NDArray[np.uint8]) -> None:
    with pytest.raises(BadImageError, match='no readable'):
        decode_compressed(encoded(picture, 'GIF'))


def test_compressed_depth_is_refused_by_name() -> None:
    with pytest.raises(BadImageError, match='depth'):
        decode_compressed(b'whatever', '16UC1; compressedDepth png')


def test_a_huge_image_in_a_small_file_is_refused() -> None:
    with pytest.raises(BadImageError, match='at most'):
        decode_compressed(encoded(np.zeros((1, MAX_SIDE + 1), np.uint8), 'PNG'))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.text(max_size=10))
def test_any_bytes_are_refused_as_bad_image(data: bytes, hint: str) -> None:
    with pytest.raises(BadImageError):
        decode_compressed(data, hint)


def _seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x010F] = 'maker'
    return [
        encoded(pixels, 'JPEG', exif=exif),
        encoded(pixels, 'PNG', exif=exif),
        encoded(pixels, 'WEBP', exif=exif),
        encoded(pixels[:, :, 0].astype(np.uint16) * 255, 'PNG'),
    ]


@pytest.mark.filterwarnings('ignore::UserWarning:PIL.*')
@settings(max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(_seeds()),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_damaged_image_gives_pixels_or_bad_image(seed: bytes, edits: list[tuple[int, int]]) -> None:
    damaged = bytearray(seed)
    for position, value in edits:
        damaged[position % len(damaged)] = value
    try:
        pixels = decode_compressed(damaged)
    except BadImageError as error:
        assert str(error)
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8


def test_read_image_reads_a_file(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    path = tmp_path / 'picture.png'
    path.write_bytes(encoded(picture, 'PNG'))

    np.testing.assert_array_equal(read_image(path), picture)


def test_read_image_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match=r'nowhere\.png cannot be read: No such file'):
        read_image(tmp_path / 'nowhere.png')


def test_read_image_names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / 'bad.jpg').write_bytes(b'no image')

    with pytest.raises(BadImageError, match=r'bad\.jpg: .*no readable'):
        read_image(tmp_path / 'bad.jpg')
