"""What a person sees is what the model sees: orientation, transparency, depth and timing."""

import io
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from opsin.config import EngineConfig, MediaLimits
from opsin.errors import ConfigError, MediaError
from opsin.inputs.media import media_item, open_media

RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]

image_item, video_item = partial(media_item, "image"), partial(media_item, "video")


def shown(value: Any, **limits: Any) -> np.ndarray[Any, Any]:
    pixels = image_item(value, MediaLimits(**limits)).pixels
    assert pixels is not None
    assert pixels.dtype == np.uint8
    return pixels


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(size: tuple[int, int], depth: int, colour_type: int, rows: Sequence[bytes], *chunks: bytes) -> bytes:
    """A PNG written by hand, for what PIL does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND", b"")


# --- orientation and transparency -----------------------------------------------------------------

# Modes of files of each format; the first ones of PNG and WebP are transparent.
FILES = [
    *(("PNG", mode) for mode in ("RGBA", "LA", "P", "RGB", "L", "1")),
    *(("WEBP", mode) for mode in ("RGBA", "RGB")),
    *(("TIFF", mode) for mode in ("RGBA", "LA", "RGB", "L", "CMYK", "YCbCr", "LAB", "P", "1")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("MPO", mode) for mode in ("RGB", "L")),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FILES),
    st.integers(0, 9),
    st.binary(min_size=4 * 12, max_size=4 * 12),
    st.sampled_from(["white", "#102030"]),
    st.booleans(),
)
def test_files_and_pil_images_are_turned_and_laid_on_the_background(
    file: tuple[str, str], turn: int, content: bytes, ground: str, is_file: bool
) -> None:
    file_format, mode = file
    base = Image.frombytes("RGBA", (4, 3), content)
    image = base.quantize(8) if mode == "P" else base.convert(mode) if mode != "LAB" else base.convert("RGB")
    if mode == "LAB":
        image = Image.frombytes("LAB", (4, 3), content[:36])
    lossless = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encoded(image, file_format, exif=orientation(turn), **lossless)

    upright = ImageOps.exif_transpose(opened(data))
    if upright.mode in ("RGBA", "LA") or "transparency" in upright.info:
        canvas = Image.new("RGBA", upright.size, ground)
        upright = Image.alpha_composite(canvas, upright.convert("RGBA"))
    expected = np.asarray(upright.convert("RGB"))
    value: Any = data if is_file else opened(data)
    np.testing.assert_array_equal(shown(value, image_background=ground), expected)
    assert image_item(data).digest == image_item(opened(data)).digest
    loaded = opened(data)
    loaded.load()
    assert image_item(data).digest == image_item(loaded).digest


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa", "CMYK", "1", "YCbCr", "HSV", "RGBX", "P"])
def test_pil_images_of_every_mode(mode: str) -> None:
    base = Image.fromarray(PIXELS)
    steps = {"PA": ["LA"], "La": ["LA"], "RGBX": ["RGB"], "HSV": ["RGB"], "YCbCr": ["RGB"], "P": ["RGB"]}
    for step in [*steps.get(mode, []), mode]:
        base = base.convert(step)
    transparent = "a" in mode.lower()
    as_rgba = base.convert("LA").convert("RGBA") if mode == "La" else base.convert("RGBA")
    rgba = np.asarray(as_rgba).astype(np.float64)
    if transparent:
        alpha = rgba[:, :, 3:] / 255
        expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
        np.testing.assert_allclose(shown(base), expected, atol=1)
        assert bool((PIXELS[:, :, 3] < 255).any())
    else:
        np.testing.assert_array_equal(shown(base), np.asarray(base.convert("RGB")))


def test_colours_under_full_transparency_do_not_matter() -> None:
    visible = PIXELS.copy()
    visible[:, :, 3] = np.where(visible[:, :, 3] < 128, 0, 255)
    other = visible.copy()
    other[visible[:, :, 3] == 0, :3] = RNG.integers(0, 256, 3)
    for form in ("PNG", "TIFF", "WEBP"):
        lossless = {"lossless": True, "exact": True} if form == "WEBP" else {}
        files = [encoded(Image.fromarray(pixels), form, **lossless) for pixels in (visible, other)]
        assert files[0] != files[1]
        assert image_item(files[0]).digest == image_item(files[1]).digest
    assert image_item(Image.fromarray(visible)).digest == image_item(files[0]).digest


def test_palettes_with_transparent_entries() -> None:
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 1]))
    image.putpalette([9, 9, 9, 255, 0, 0, 0, 0, 255])
    for form in ("PNG", "GIF"):
        assert shown(encoded(image, form, transparency=0)).tolist() == [[WHITE, RED, BLUE, RED]]
    graded = encoded(image, "PNG", transparency=bytes([0, 128, 255]))
    assert shown(graded, image_background="black").tolist() == [[[0] * 3, [128, 0, 0], BLUE, [128, 0, 0]]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_level_of_a_png_can_be_transparent_at_every_depth(depth: int) -> None:
    levels = [0, 2**depth - 1] if depth == 1 else [0, 1, 2, 2**depth - 1]
    row = sum(level << (depth * (len(levels) - 1 - place)) for place, level in enumerate(levels))
    row <<= -(depth * len(levels)) % 8
    packed = row.to_bytes(-(-depth * len(levels) // 8), "big")
    for hidden in levels:
        data = png((len(levels), 1), depth, 0, [packed], chunk(b"tRNS", struct.pack(">H", hidden)))
        seen = [255 if level == hidden else level * 255 // (2**depth - 1) for level in levels]
        assert shown(data)[0, :, 0].tolist() == seen
        assert image_item(data).digest == image_item(opened(data)).digest


def test_a_colour_of_a_png_can_be_transparent() -> None:
    trns = chunk(b"tRNS", struct.pack(">HHH", 10, 20, 30))
    assert shown(png((2, 1), 8, 2, [bytes([10, 20, 30, 1, 2, 3])], trns)).tolist() == [[WHITE, [1, 2, 3]]]
    wide = struct.pack(">6H", 0x0A01, 0x1402, 0x1E03, 0x0100, 0x0200, 0x0300)
    trns = chunk(b"tRNS", wide[:6])
    data = png((2, 1), 16, 2, [wide], trns)
    assert shown(data).tolist() == [[WHITE, [1, 2, 3]]]
    loaded = opened(data)
    loaded.load()
    assert shown(loaded).tolist() == [[WHITE, [1, 2, 3]]]


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_broken_exif_is_no_error(exif: bytes) -> None:
    image = Image.fromarray(PIXELS[:, :, :3])
    for form in ("PNG", "WEBP", "JPEG"):
        data = encoded(image, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
        assert shown(data).shape == (6, 9, 3)
    assert shown(png((2, 1), 8, 0, [b"\1\2"], chunk(b"eXIf", b"junk"))).shape == (1, 2, 3)


def test_exif_after_a_pngs_pixels_counts_too() -> None:
    data = encoded(Image.fromarray(PIXELS[:, :, :3]), "PNG")
    tail = chunk(b"eXIf", orientation(6).tobytes().removeprefix(b"Exif\0\0"))
    late = data[:-12] + tail + data[-12:]
    np.testing.assert_array_equal(shown(late), np.rot90(PIXELS[:, :, :3], -1))


@pytest.mark.parametrize("colour", ["transparent", "#12345678", "no-colour", "", 7])
def test_the_background_is_an_opaque_colour(colour: Any) -> None:
    with pytest.raises(ConfigError, match="image_background=.*expected a (colour such as white|string)"):
        EngineConfig(model="m", image_background=colour)


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled(mode: str) -> None:
    grey = RNG.integers(0, 2**16, (8, 9), dtype=np.uint16)
    expected = np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    data = grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    np.testing.assert_array_equal(shown(Image.frombytes(mode, (9, 8), data)), expected)
    if mode == "I;16":
        for form in ("PNG", "TIFF"):
            np.testing.assert_array_equal(shown(encoded(Image.fromarray(grey), form)), expected)


def test_tiffs_of_16_bits_whose_white_is_zero() -> None:
    grey = RNG.integers(0, 2**16, (8, 9), dtype=np.uint16)
    data = bytearray(encoded(Image.fromarray(grey), "TIFF"))
    entry = data.index(struct.pack("<HHIH", 262, 3, 1, 1))
    data[entry + 8 : entry + 10] = struct.pack("<H", 0)
    np.testing.assert_array_equal(shown(bytes(data))[:, :, 0], 255 - (grey >> 8))


def test_wide_values_are_taken_from_0_to_255_and_refused_otherwise() -> None:
    values = np.array([[0, 1, 128, 255]])
    for dtype in (np.int32, np.float32):
        assert shown(Image.fromarray(values.astype(dtype)))[0, :, 0].tolist() == [0, 1, 128, 255]
        assert shown(encoded(Image.fromarray(values.astype(dtype)), "TIFF"))[0, :, 2].tolist() == [
            0,
            1,
            128,
            255,
        ]
    zero = Image.fromarray(np.zeros((2, 2), np.float32))
    assert not shown(zero).any()
    for values, dtype, said in (
        ([[-1, 5]], np.int32, "mode I with values from -1 to 5; expected 0 to 255: scale them"),
        ([[0, 70_000]], np.int32, "0 to 70000"),
        ([[0.0, 0.5]], np.float32, "mode F with values from 0 to 0.5"),
        ([[0.0, 1000.0]], np.float32, "from 0 to 1000"),
        ([[0.0, np.nan]], np.float32, "nan"),
        ([[0.0, np.inf]], np.float32, "inf"),
    ):
        with pytest.raises(MediaError, match=said):
            shown(Image.fromarray(np.array(values, dtype)))


# --- animations -----------------------------------------------------------------------------------


def test_the_first_frame_of_an_animation_is_shown_as_it_is_drawn() -> None:
    drawn = Image.new("P", (4, 4), 1)
    drawn.putpalette([9, 9, 9, 255, 0, 0])
    data = bytearray(encoded(drawn, "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)  # the canvas is larger than the frame
    pixels = shown(bytes(data))
    assert pixels.shape == (8, 8, 3)
    assert pixels[3, 3].tolist() == RED
    assert pixels[0, 5].tolist() == pixels[5, 0].tolist() == WHITE

    still, *frames = [Image.new("RGB", (4, 4), colour) for colour in ("black", "red", "blue")]
    data_of_two = encoded(still, "PNG", save_all=True, append_images=frames, default_image=True, duration=100)
    assert shown(data_of_two)[0, 0].tolist() == RED
    assert shown(opened(data_of_two))[0, 0].tolist() == RED
    video = video_item(data_of_two)
    assert video.pixels is not None
    assert video.pixels[:, 0, 0].tolist() == [RED, BLUE]


def test_frames_of_animations_are_laid_on_the_background() -> None:
    frames = []
    for place in range(3):
        frame = Image.new("RGBA", (6, 6), (7, 7, 7, 0))
        frame.paste((255, 0, 0, 255), (place, 0, place + 1, 6))
        frames.append(frame)
    for form in ("PNG", "WEBP", "GIF"):
        options = (
            {"lossless": True, "exact": True} if form == "WEBP" else {"disposal": 2 if form == "GIF" else 1}
        )
        video = video_item(
            encoded(
                frames[0], form, save_all=True, append_images=frames[1:], duration=[100, 50, 200], **options
            )
        )
        assert video.pixels is not None
        assert video.pixels[0, 0].tolist() == [RED, *[WHITE] * 5], form
        assert video.pixels[2, 0].tolist() == [WHITE, WHITE, RED, WHITE, WHITE, WHITE], form
        assert video.times == pytest.approx((0, 0.1, 0.15)), form


def test_animations_are_turned() -> None:
    frames = [Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(2)]
    for form in ("PNG", "WEBP"):
        lossless = {"lossless": True} if form == "WEBP" else {}
        data = encoded(
            frames[0], form, save_all=True, append_images=frames[1:], exif=orientation(8), **lossless
        )
        video = video_item(data)
        assert video.pixels is not None
        np.testing.assert_array_equal(video.pixels, [np.rot90(np.asarray(frame)) for frame in frames])


# --- videos ---------------------------------------------------------------------------------------


def video_file(
    container: str,
    codec: str,
    frames: Sequence[np.ndarray[Any, Any]],
    *,
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    color_range: int = 0,
) -> bytes:
    """Frames as a file; ``times`` are in hundredths of a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=100)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 100)
        stream.codec_context.color_range = color_range
        stream.options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}  # it refuses alpha otherwise
        for number, pixels in enumerate(frames):
            source = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            frame = source.reformat(format=pix_fmt, dst_color_range=color_range)
            frame.color_range = color_range
            frame.pts = times[number] if times else 10 * number
            frame.time_base = Fraction(1, 100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def quadrants() -> np.ndarray[Any, Any]:
    """(48, 64, 3): dark red, red, green and blue quarters, so that every turn looks different."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:] = (90, 0, 0), (250, 0, 0)
    pixels[24:, :32], pixels[24:, 32:] = (0, 250, 0), (0, 0, 250)
    return pixels


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "turn"),
    [
        (1, 0, 0, 1, lambda p: p),
        (0, 1, -1, 0, lambda p: np.rot90(p, -1)),
        (-1, 0, 0, -1, lambda p: np.rot90(p, 2)),
        (0, -1, 1, 0, lambda p: np.rot90(p)),
        (-1, 0, 0, 1, lambda p: p[:, ::-1]),
        (1, 0, 0, -1, lambda p: p[::-1]),
        (0, 1, 1, 0, lambda p: p.swapaxes(0, 1)),
        (0, -1, -1, 0, lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    ],
)
def test_videos_are_turned_by_their_display_matrix(a: int, b: int, c: int, d: int, turn: Any) -> None:
    data = bytearray(video_file("mp4", "mpeg4", [quadrants()] * 2))
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    pixels = video_item(bytes(data)).pixels
    assert pixels is not None
    expected = turn(quadrants()).astype(int)
    assert pixels.shape == (2, *expected.shape)
    assert np.median(np.abs(pixels[0].astype(int) - expected)) < 12
    assert np.mean(np.abs(pixels[0].astype(int) - expected)) < 20


@pytest.mark.parametrize(
    ("container", "codec", "pix_fmt"),
    [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("mov", "qtrle", "argb"),
    ],
)
def test_transparent_videos_are_laid_on_the_background(container: str, codec: str, pix_fmt: str) -> None:
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (255, 0, 0, 255), (0, 0, 255, 0)
    data = video_file(container, codec, [pixels] * 3, pix_fmt=pix_fmt)
    for ground, colour in (("white", WHITE), ("#008000", [0, 128, 0])):
        video = video_item(data, MediaLimits(image_background=ground)).pixels
        assert video is not None
        assert len(video) == 3
        np.testing.assert_allclose(video[:, 10, 10].astype(int), [RED] * 3, atol=4)
        np.testing.assert_allclose(video[:, 10, 60].astype(int), [colour] * 3, atol=4)


@pytest.mark.parametrize("color_range", [1, 2])
def test_full_and_limited_range_are_the_same_colours(color_range: int) -> None:
    frames = [np.full((48, 64, 3), level, np.uint8) for level in (0, 40, 200, 255)]
    pixels = video_item(video_file("matroska", "ffv1", frames, color_range=color_range)).pixels
    assert pixels is not None
    np.testing.assert_allclose(pixels[:, 5, 5, 0].astype(int), [0, 40, 200, 255], atol=2)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("matroska", "ffv1")])
def test_frame_times_of_a_variable_rate_reach_the_item(container: str, codec: str) -> None:
    frames = [np.full((48, 64, 3), 40 * number, np.uint8) for number in range(5)]
    data = video_file(container, codec, frames, times=[0, 10, 50, 60, 200])
    assert video_item(data).times == pytest.approx((0, 0.1, 0.5, 0.6, 2.0), abs=2e-3)
    assert video_item(data, MediaLimits(sampled_video_frames=3)).times == pytest.approx((0, 0.5, 2), abs=2e-3)


def test_frames_can_bring_their_times() -> None:
    frames = RNG.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    assert video_item(frames).times is None
    items = [
        video_item((frames, {"fps": 2})),
        video_item((list(frames), {"times": [0, 0.5, 1]})),
        video_item(([Image.fromarray(frame) for frame in frames], {"fps": 2.0})),
    ]
    assert [item.times for item in items] == [(0, 0.5, 1)] * 3
    assert len({item.digest for item in items}) == 1
    assert items[0].digest != video_item(frames).digest  # a family may place the same frames otherwise
    for timing in (
        {},
        {"fps": 0},
        {"fps": "fast"},
        {"times": [0, 1]},
        {"times": [0, 2, 1]},
        {"fps": 1, "times": [0, 1, 2]},
    ):
        with pytest.raises(MediaError, match=r"for 3 frames; expected \{'fps'"):
            video_item((frames, timing))
    with pytest.raises(MediaError, match="unknown 'speed'"):
        video_item((frames, {"speed": 2}))
    with pytest.raises(MediaError, match="has times of its own"):
        video_item((b"\0\0\0\x18ftypmp42", {"fps": 2}))


def test_sizes_are_known_before_anything_is_decoded() -> None:
    truncated = encoded(Image.fromarray(RNG.integers(0, 256, (64, 48, 3), dtype=np.uint8)), "PNG")[:3000]
    assert open_media("image", truncated).size == (48, 64, 1)
    with pytest.raises(MediaError, match="truncated"):
        open_media("image", truncated).decode()
    assert open_media("video", [PIXELS[:, :, :3]] * 4).size == (9, 6, 4)
    assert open_media("video", video_file("mp4", "mpeg4", [quadrants()] * 3)).size == (64, 48, 3)
