"""Broken and hostile picture files: a picture or `BadImage`, each time, within memory and time; a build goes on.

Another seed draws other files: HEADSTART_FAULT_SEED=7 pytest tests/test_cache_bad_pictures.py.
"""

import hashlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_pictures import BOMBS, mutated, valid
from faults import SEED, count
from kill_builds import ending, in_child
from stand_in import StandIn

from cache_builder import FeatureCache, build
from cache_builder.datasets import folder
from cache_builder.images import MAX_SIDE, BadImage, decode, image_size, open_image

MUTATED = 3_000
BUILT = 1_000
SECONDS = 20
MEMORY = 900 << 20

# A decoder's warnings say what is odd about a file that it reads all the same.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A file over which a decoder broods is a failure, not a long test."""

    def too_long(*_: object) -> None:
        raise AssertionError("took too long")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(data: bytes, upright: bool = True) -> tuple[str, str]:
    """A digest of the pixels, or what is wrong."""
    try:
        image = decode(data, upright=upright)
    except BadImage as error:
        return "bad", str(error)
    assert image.mode == "RGB"
    assert min(image.size) > 0
    pixels = np.asarray(image)
    assert pixels.shape == (image.height, image.width, 3)
    return "read", hashlib.sha256(pixels.tobytes()).hexdigest()


def test_a_changed_file_is_a_picture_or_a_bad_image_and_the_same_twice() -> None:
    files = valid()
    assert {outcome(data)[0] for data in files.values()} == {"read"}
    ends = {"read": 0, "bad": 0}
    for case in range(MUTATED):
        name, data = mutated(files, np.random.default_rng([SEED, case]))
        try:
            found = outcome(data, bool(case % 2))
            assert outcome(data, bool(case % 2)) == found
        except Exception as error:
            raise AssertionError(f"seed [{SEED}, {case}]: {name}") from error
        ends[found[0]] += 1
        count("picture file changed", "same result" if found[0] == "read" else "clear error")
    assert min(ends.values()) > MUTATED / 10


def test_what_is_measured_is_what_is_opened_or_one_of_them_refuses(tmp_path: Path) -> None:
    files, path = valid(), tmp_path / "a"
    for case in range(300):
        name, data = mutated(files, np.random.default_rng([SEED, 1, case]))
        path.write_bytes(data)
        try:
            opened = open_image(path, upright=True).size
        except BadImage:
            opened = None
        try:
            measured = image_size(path, upright=True)
        except BadImage:
            measured = None
        assert opened is None or measured == opened, f"seed [{SEED}, 1, {case}]: {name}"


def test_one_build_of_a_thousand_changed_files_quarantines_and_ends(
    tmp_path: Path, fast_path: Path
) -> None:
    """A `folder` whose pictures are all damaged, through threads, preprocessing and the encoder, twice."""
    files, root = valid(), tmp_path / "own"
    (root / "images").mkdir(parents=True)
    expected: dict[str, str] = {}
    for case in range(BUILT):
        _, data = mutated(files, np.random.default_rng([SEED, 2, case]))
        (root / f"images/{case:04}.jpg").write_bytes(data)
        expected[f"{case:04}.jpg"] = outcome(data)[0]
    caches = [
        build(
            folder.load(root),
            StandIn(),
            fast_path / f"{i}.zarr",
            streams=["image/pooled"],
            progress=False,
        )
        for i in range(2)
    ]
    assert caches[0].digest() == caches[1].digest()
    cache = FeatureCache.open(fast_path / "0.zarr", check="read")
    bad = {name for name, end in expected.items() if end == "bad"}
    assert set(cache.quarantined) == bad
    values = cache.read("image/pooled")
    ill = np.isin(cache.image_ids, sorted(bad))
    assert np.isfinite(values[~ill]).all()
    assert np.isnan(values[ill]).all()
    assert 0.2 < ill.mean() < 0.95
    count("picture file changed, in one build", "clear error", times=len(bad))
    count("picture file changed, in one build", "same result", times=BUILT - len(bad))


def within(data: bytes) -> None:
    """Decode, in this process, which has little memory left."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    outcome(data)


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is limited as Linux does it"
)
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little_memory_and_time(name: str) -> None:
    data = BOMBS[name]()
    assert ending(in_child(lambda: within(data))) == 0
    count("picture bomb", "same result" if outcome(data)[0] == "read" else "clear error")


def test_a_picture_of_a_long_side_is_refused_by_its_header(tmp_path: Path) -> None:
    data = BOMBS["WebP canvas 15,000,000 wide"]()
    (tmp_path / "a.webp").write_bytes(data)
    for read in (open_image, image_size):
        with pytest.raises(
            BadImage, match=rf"14968997 × 5 pixels, more than {MAX_SIDE:,} on a side"
        ):
            read(tmp_path / "a.webp")
