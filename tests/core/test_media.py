"""`opsin.inputs.media`, `media_files`, `data_url`: whatever users pass becomes RGB, or a clear refusal."""

import base64
import io
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from opsin.config import MediaLimits
from opsin.errors import ConfigError, MediaError
from opsin.inputs.data_url import decode_data_url
from opsin.inputs.media import embeds_item, media_item
from opsin.inputs.media_files import sample_indices

image_item, video_item = partial(media_item, "image"), partial(media_item, "video")

GOLDEN = Path(__file__).parents[1] / "golden" / "images"
RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(PIXELS), "PNG")


def pixels_of(item: Any) -> np.ndarray[Any, Any]:
    assert item.pixels is not None
    assert item.pixels.dtype == np.uint8
    return item.pixels


# --- pictures -------------------------------------------------------------------------------------


def test_equal_pictures_have_one_digest_however_they_are_passed(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    ways = [
        Image.fromarray(PIXELS),
        PIXELS,
        np.asfortranarray(PIXELS),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        PNG,
        bytearray(PNG),
        path,
        str(path),
        path.as_uri(),
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        image_item(PIXELS),
    ]
    items = [image_item(way) for way in ways]
    for item in items:
        np.testing.assert_array_equal(pixels_of(item), PIXELS)
    assert len({item.digest for item in items}) == 1


def test_digests_cover_shape_kind_and_content() -> None:
    flat = RNG.integers(0, 256, 48, dtype=np.uint8)
    changed = PIXELS.copy()
    changed[-1, -1, -1] ^= 1
    digests = [
        image_item(flat.reshape(2, 8, 3)).digest,
        image_item(flat.reshape(4, 4, 3)).digest,
        video_item(flat.reshape(1, 4, 4, 3)).digest,
        video_item(flat.reshape(4, 1, 4, 3)).digest,
        image_item(PIXELS).digest,
        image_item(changed).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_grey_arrays_and_animated_pictures_are_images_too() -> None:
    grey = PIXELS[:, :, 0]
    np.testing.assert_array_equal(pixels_of(image_item(grey)), np.stack([grey] * 3, axis=2))
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels_of(image_item(animated))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (3, "got a int"),
        (PIXELS.astype(np.float32), r"float32 \(20, 30, 3\); expected uint8 .*\(255 \* values\).round"),
        (PIXELS.astype(np.int64), r"int64 \(20, 30, 3\); expected uint8 .*; convert it"),
        (PIXELS > 7, r"bool \(20, 30, 3\); expected uint8"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 \(4, 5, 4\); .*for transparency, pass a PIL image"),
        (torch.zeros(3, 4, 5, dtype=torch.bfloat16), r"torch.bfloat16 \(3, 4, 5\)"),
        (PIXELS[None], r"uint8 \(1, 20, 30, 3\)"),
        (torch.rand(3, 4, 5), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "0x4|4x0"),
        (Image.new("RGB", (0, 5)), "0x5"),
        ("no-such-file.png", "cannot read the file 'no-such-file.png'"),
        ("A" * 100_000, r"cannot read the file 'A{100}'"),
        ("bad\0name", "cannot read the file"),
        (b"", "cannot be read; expected one of PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        ("ftp://host/a.png", "ftp:// are not supported"),
        (video_item(PIXELS[None]), "modality video where image"),
    ],
)
def test_what_is_not_a_picture_is_refused(value: Any, complaint: str) -> None:
    with pytest.raises(MediaError, match=complaint):
        image_item(value)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_read_and_its_truncated_file_refused(file_format: str, tmp_path: Path) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, file_format)
    assert pixels_of(image_item(data)).shape == (64, 64, 3)
    path = tmp_path / "secret-name"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError) as caught:
        image_item(path)
    message = str(caught.value)
    assert "truncated or damaged" in message or "cannot be read" in message
    assert "0x" not in message
    assert "secret-name" not in message
    if file_format == "PNG":  # one that was opened by the user, and fails when it is decoded
        with Image.open(path) as lazy, pytest.raises(MediaError, match="truncated or damaged"):
            image_item(lazy)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_the_pixel_cap_is_checked_from_the_header() -> None:
    with pytest.raises(MediaError, match="9000x9000 pixels are too many"):
        image_item(png_header(9000, 9000))
    with pytest.raises(MediaError, match="has too many pixels; at most"):  # PIL's own check comes first
        image_item(png_header(60000, 60000))
    with pytest.raises(MediaError, match="30x20 pixels are too many; at most 599"):
        image_item(PIXELS, MediaLimits(max_image_pixels=599))
    assert image_item(PIXELS, MediaLimits(max_image_pixels=600)).pixels is not None


def test_the_byte_cap_holds_for_every_source(tmp_path: Path) -> None:
    limits = MediaLimits(max_media_bytes=len(PNG) - 1)
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    url = "data:;base64," + base64.b64encode(PNG).decode()
    for source in (PNG, path, url, "data:," + quote(PNG)):
        with pytest.raises(MediaError, match=f"at most {len(PNG) - 1} are accepted"):
            image_item(source, limits)
    with pytest.raises(ConfigError, match="max_media_bytes=0"):
        MediaLimits(max_media_bytes=0)


def test_nothing_is_fetched_and_files_only_where_they_may_be_read(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="http URLs are fetched in chats only"):
        image_item("http://host/a.png")
    with pytest.raises(MediaError, match="frame 1: https URLs are fetched in chats only"):
        video_item(["HTTPS://host/a.png"])
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    for source in (path, str(path), path.as_uri(), tmp_path):
        with pytest.raises(MediaError, match="local files are not read here"):
            image_item(source, local_files=False)
        with pytest.raises(MediaError, match="local files are not read here"):
            video_item(source, local_files=False)


def test_one_lazily_opened_picture_is_decoded_by_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, inside, most = ImageFile.ImageFile.load, Counter[int](), 0

    def slow(image: ImageFile.ImageFile) -> Any:
        nonlocal most
        inside[threading.get_ident()] += 1
        most = max(most, sum(depth > 0 for depth in list(inside.values())))
        time.sleep(0.01)
        try:
            return decode(image)
        finally:
            inside[threading.get_ident()] -= 1

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow)
    with Image.open(GOLDEN / "coffee_320x213.png") as image, ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: image_item(image).digest, range(16)))
    assert most == 1
    assert digests == {image_item(GOLDEN / "coffee_320x213.png").digest}


# --- data: URLs -----------------------------------------------------------------------------------


@given(st.binary(max_size=60))
def test_data_urls_decode_in_every_spelling(content: bytes) -> None:
    plain = base64.b64encode(content).decode()
    spellings = [
        "data:image/png;base64," + plain,
        "data:text/html;charset=utf-8;name=a.png;base64," + plain,
        "DATA:;BASE64," + plain.rstrip("="),
        "data:;base64," + base64.urlsafe_b64encode(content).decode(),
        "data:;base64," + quote(plain, safe=""),
        "data:;base64," + "\r\n ".join(plain),
        "data:application/octet-stream," + quote(content),
    ]
    for url in spellings:
        assert decode_data_url(url, 60) == content


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:;base64,####", "data:;base64,AAAAA", "data:"])
def test_malformed_data_urls_are_refused(url: str) -> None:
    with pytest.raises(MediaError, match="data: URL") as caught:
        image_item(url)
    assert "####" not in str(caught.value)


# --- videos ---------------------------------------------------------------------------------------

FRAMES = RNG.integers(0, 256, (3, 12, 16, 3), dtype=np.uint8)


def test_a_video_is_the_same_however_its_frames_are_passed(tmp_path: Path) -> None:
    for index, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / f"frame_{index + 9}.png")  # 9, 10, 11: not alphabetical
    paths = [str(tmp_path / f"frame_{number}.png") for number in (9, 10, 11)]
    images = [Image.fromarray(frame) for frame in FRAMES]
    animated = encoded(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True)
    animated_url = "data:image/webp;base64," + base64.b64encode(animated).decode()
    ways = [
        images,
        tuple(FRAMES),
        FRAMES,
        torch.from_numpy(FRAMES),
        torch.from_numpy(FRAMES).permute(0, 3, 1, 2),
        paths,
        tmp_path,
        str(tmp_path),
        animated,
        animated_url,
        [encoded(image, "PNG") for image in images],
    ]
    items = [video_item(way) for way in ways]
    for item in items:
        np.testing.assert_array_equal(pixels_of(item), FRAMES)
    assert len({item.digest for item in items}) == 1
    assert video_item(items[0]) is items[0]


@pytest.mark.parametrize("file_format", ["GIF", "TIFF", "PNG"])
def test_animated_files_are_sampled_evenly(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 6), (0, 0, 20 * index)) for index in range(10)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    pixels = pixels_of(video_item(data, MediaLimits(sampled_video_frames=4)))
    assert pixels[:, 0, 0, 2].tolist() == [0, 60, 120, 180]


@given(st.integers(1, 500), st.integers(1, 40))
def test_sampling_is_even_and_never_repeats(num_frames: int, most: int) -> None:
    indices = sample_indices(num_frames, most)
    assert len(indices) == min(num_frames, most)
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    if len(indices) > 1:
        assert indices[-1] == num_frames - 1
        gaps = [b - a for a, b in pairwise(indices)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "0 frames"),
        ([PIXELS] * 9, "9 frames; expected 1 to 8"),
        ([PIXELS, PIXELS[:10]], "one size, got 30x10, 30x20"),
        ([PIXELS, b"nonsense"], "frame 2: the image cannot be read"),
        ([video_item(PIXELS[None])], "frame 1: got an item of modality video"),
        ([embeds_item("image", {"rows": torch.ones(1, 2)})], "frame 1: got embeddings"),
        ("bad\0name", "cannot read the file"),
        ([PIXELS] * 8, "8 frames of 30x20 pixels are too many"),
        (FRAMES.astype(np.float64), "float64"),
        (FRAMES[0], r"uint8 \(12, 16, 3\); expected uint8 \(frames"),
        (7, "got a int as a video"),
        (b"\x00\x00\x00\x18ftypmp42 and nothing more", "truncated or damaged"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot be read"),
    ],
)
def test_what_is_not_a_video_is_refused(value: Any, complaint: str) -> None:
    with pytest.raises(MediaError, match=complaint):
        video_item(value, MediaLimits(max_video_frames=8, max_video_pixels=30 * 20 * 8 - 1))


def video_file(container: str, codec: str, num_frames: int) -> bytes:
    """Frames whose grey level is ten times their number."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * number, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_video_files_are_decoded_and_sampled(container: str) -> None:
    data = video_file(container, "mpeg4", 21)
    pixels = pixels_of(video_item(data, MediaLimits(sampled_video_frames=5)))
    assert pixels.shape == (5, 48, 64, 3)
    np.testing.assert_allclose(pixels.mean(axis=(1, 2, 3)), [0, 50, 100, 150, 200], atol=6)
    with pytest.raises(MediaError, match="64x48 pixels are too many"):
        video_item(data, MediaLimits(max_image_pixels=64 * 48 - 1))


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match="pip install av"):
        video_item(video_file("mp4", "mpeg4", 2))


# --- embeddings -----------------------------------------------------------------------------------


def test_embeddings_digests_cover_names_dtypes_and_shapes() -> None:
    rows = torch.arange(8, dtype=torch.float32)
    digests = [
        embeds_item("image", {"embeds": rows.reshape(2, 4)}).digest,
        embeds_item("video", {"embeds": rows.reshape(2, 4)}).digest,
        embeds_item("image", {"other": rows.reshape(2, 4)}).digest,
        embeds_item("image", {"embeds": rows.reshape(4, 2)}).digest,
        embeds_item("image", {"embeds": rows.reshape(2, 4).bfloat16()}).digest,
        embeds_item("image", {"embeds": rows.reshape(2, 4), "grid": torch.tensor([1, 2, 4])}).digest,
        embeds_item("image", {"embeds": rows.reshape(2, 4), "grid": torch.tensor([1, 4, 2])}).digest,
    ]
    assert len(set(digests)) == len(digests)
    again = embeds_item(
        "image", {"grid": torch.tensor([1, 4, 2]), "embeds": rows.reshape(4, 2).clone().view(2, 4)}
    )
    assert again.digest == digests[-1]


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"embeds": torch.tensor([[1.0, float("nan")]])}, "NaN"),
        ({"embeds": torch.tensor([[float("inf")]])}, "infinity"),
        ({"embeds": torch.eye(3).to_sparse()}, "dense"),
        ({"embeds": torch.ones(2, 2, dtype=torch.int64)}, "floating-point"),
        ({}, "floating-point"),
    ],
)
def test_unusable_embeddings_are_refused(tensors: dict[str, torch.Tensor], complaint: str) -> None:
    with pytest.raises(MediaError, match=complaint):
        embeds_item("image", tensors)
