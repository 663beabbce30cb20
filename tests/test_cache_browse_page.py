"""The page of `headstart browse`, served by a process of its own and driven in a browser without a screen.

Nothing of the page is imported here: warnings of its libraries are theirs. What a browser shows is held against what
browse.py computes.
"""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
from stand_in import dataset

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.browse import nearest_to_image, nearest_to_text, spaces_of
from cache_builder.browse_samples import samples_of

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nicegui", "fastapi", "uvicorn")),
    reason="needs pip install 'headstart[browse]'",
)

LOADED = "() => [...document.querySelectorAll('.map img')].every(i => i.naturalWidth)"

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

PATIENCE = 60
"""Seconds until something that hangs fails; nothing is timed."""


@pytest.fixture(scope="module")
def caches(fast_folder: Path) -> list[FeatureCache]:
    """The same few scenes under three backbones, one of them without a joint space."""
    world = load_dataset("toy_world", scale=0.01)
    return [
        build(
            world,
            load_backbone(f"{name}:demo"),
            fast_folder / f"browse-{name}.zarr",
            streams=["image/patches", *pooled],
            progress=False,
        )
        for name, pooled in (
            ("clip", ["image/pooled", "text/pooled"]),
            ("pe", ["image/pooled", "text/pooled"]),
            ("llava", ["text/tokens"]),
        )
    ]


@contextmanager
def served(
    caches: list[FeatureCache], folder: Path, *options: str
) -> Generator[tuple[subprocess.Popen[str], str]]:
    """The verb in a process of its own, and the address that it prints."""
    command = [sys.executable, "-m", "heads.cli", "browse", *(str(c.path) for c in caches)]
    process = subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/\?key=[\w-]{20,}", line):
                break
        else:
            pytest.fail("".join(said))
        yield process, found[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Ctrl-C; exit status and the rest of what it said."""
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def known(address: str) -> tuple[str, dict[str, str]]:
    """The address without its key, and the cookie that a browser gets for it."""
    url, _, key = address.partition("?key=")
    return url, {"Cookie": f"another=1; headstart-{url.rstrip('/').rpartition(':')[2]}={key}"}


def ask(url: str, **headers: str) -> tuple[int, bytes, Any]:
    with_cookies = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    try:
        with with_cookies.open(
            urllib.request.Request(url, headers=headers), timeout=PATIENCE
        ) as got:
            return got.status, got.read(), got.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def other_addresses() -> list[str]:
    """Of this machine: the rest of loopback, and what it would send from; nothing is sent."""
    found = ["127.0.0.2"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no network at all
    return found


def listeners(process: int) -> set[str]:
    """Local addresses, in hex, of sockets on which a process listens, by Linux' own tables."""
    held = {os.readlink(f) for f in Path(f"/proc/{process}/fd").iterdir() if f.is_symlink()}
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
    ]
    return {w[1].partition(":")[0] for w in lines if w[3] == "0A" and f"socket:[{w[9]}]" in held}


def test_it_listens_on_loopback_only_and_ends_at_ctrl_c(
    caches: list[FeatureCache], tmp_path: Path
) -> None:
    with served(caches[:2], tmp_path) as (process, address):
        url, _ = known(address)
        status, page, headers = ask(address)
        assert status == 200
        assert b"headstart browse" in page
        assert "default-src 'self'" in headers["content-security-policy"]
        port = int(url.rstrip("/").rpartition(":")[2])
        for address in other_addresses():
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), PATIENCE)
        if Path("/proc/net/tcp").exists():
            assert listeners(process.pid) == {"0100007F"}
        busy = subprocess.run(
            [sys.executable, "-m", "heads.cli", "browse", str(caches[0].path), "--port", str(port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert busy.returncode == 1
        assert re.fullmatch(rf"headstart browse: port {port} of .* free one\n", busy.stderr)
        assert stop(process) == (0, "\nstopped\n")
    assert list(tmp_path.iterdir()) == []


def test_other_pages_of_the_browser_are_refused(caches: list[FeatureCache], tmp_path: Path) -> None:
    with served(caches[:1], tmp_path) as (_, address):
        url, cookie = known(address)
        port = url.rstrip("/").rpartition(":")[2]
        assert ask(url, **cookie, Host="rebound.example")[0] == 403
        assert ask(url, **cookie, Host=f"rebound.example:{port}")[0] == 403
        assert ask(url, **cookie, Origin="https://elsewhere.example")[0] == 403
        assert ask(url, **cookie, Origin=url.rstrip("/"))[0] == 200
        assert ask(url, **cookie, Host=f"localhost:{port}")[0] == 200
        assert ask(f"{url}picture/144/0", **cookie)[0] == 200
        assert ask(f"{url}picture/144/999999", **cookie)[0] == 404
        wanted = f"{url}_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "x3JJHMbDL1EzLkh9GBhXDw=="
        assert ask(wanted, **upgrade, **cookie, Origin="https://elsewhere.example")[0] == 403


def test_nobody_else_on_this_machine_sees_anything_without_the_key(
    caches: list[FeatureCache], tmp_path: Path
) -> None:
    with served(caches[:1], tmp_path) as (_, address):
        url, cookie = known(address)
        name, _, key = cookie["Cookie"].partition("; ")[2].partition("=")
        wrong = [
            {},
            {"Cookie": f"{name}={key[:-1]}"},
            {"Cookie": f"other={key}"},
            {"Cookie": '=;;"x'},
        ]
        socket_io = f"{url}_nicegui_ws/socket.io/?EIO=4&transport=polling"
        for headers in wrong:
            for place in (url, f"{url}?key=guess", f"{url}?key=", f"{url}picture/144/0", socket_io):
                status, said, _ = ask(place, **headers)
                assert (status, said) == (403, b"open the address that headstart browse printed")
        assert ask(socket_io, **cookie)[0] == 200
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "x3JJHMbDL1EzLkh9GBhXDw=="
        assert ask(socket_io.replace("polling", "websocket"), **upgrade)[0] == 403
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            urllib.request.urlopen(address, timeout=PATIENCE)  # no cookie jar: led on to a refusal
        caught.value.close()


def test_the_key_is_another_each_time_and_a_cookie_that_scripts_cannot_read(
    caches: list[FeatureCache], tmp_path: Path
) -> None:
    keys: set[str] = set()
    for _ in range(2):
        with served(caches[:1], tmp_path) as (_, address):
            url, _, key = address.partition("?key=")
            keys.add(key)
            with closing(HTTPConnection(url.split("/")[2], timeout=PATIENCE)) as connection:
                connection.request("GET", f"/?key={key}")
                answer = connection.getresponse()
                assert (answer.status, answer.headers["location"]) == (303, "/")
                said = answer.headers["set-cookie"].lower()
                assert "httponly" in said
                assert "samesite=strict" in said
    assert len(keys) == 2


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Watched:
    """A page in a browser, and everything that it asked for or complained about."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.asked: set[str] = set()
        page.on("console", lambda m: self.complaints.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", self._failed)
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("websocket", lambda opened: self.asked.add(opened.url))

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # a picture that left the page before it came
            self.complaints.append(f"{request.url[:200]}: {request.failure}")

    def open(self) -> Any:
        self.page.goto(self.url)
        self.page.locator(".strip .thumb").first.wait_for()
        return self.page

    def check(self) -> None:
        assert self.complaints == []
        hosts = {url.split("/")[2] for url in self.asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {self.url.split("/")[2]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of this machine; none is downloaded."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium, e.g. apt install chromium")
    with sync.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def running(caches: list[FeatureCache], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(caches, tmp_path_factory.mktemp("browse"), "-k", "3") as (process, url):
        yield url
        code, said = stop(process)
        assert (code, said) == (0, "\nstopped\n")  # and no traceback of any page


@pytest.fixture
def watched(browser: Any, running: str) -> Iterator[Watched]:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(PATIENCE * 1000)
    yield Watched(page, running)
    page.close()


def shown(page: Any, column: int, part: str = ".spaces") -> list[tuple[str, float]]:
    """Ids and cosines of a backbone's neighbours."""
    figures = page.locator(part).first.locator(".space").nth(column).locator("figure")
    return [
        (
            figures.nth(i).locator("img").get_attribute("alt"),
            float(figures.nth(i).locator(".caption").first.inner_text()),
        )
        for i in range(figures.count())
    ]


def test_a_sample_shows_its_neighbours_under_every_backbone(
    watched: Watched, caches: list[FeatureCache]
) -> None:
    page = watched.open()
    samples = samples_of(caches, None, 2000)
    spaces = spaces_of(caches, samples)
    page.locator(".strip .thumb").nth(4).click()
    page.locator("h2", has_text=samples.ids[4]).wait_for()
    for column, space in enumerate(spaces):
        wanted = [(samples.ids[i], round(c, 3)) for i, c in nearest_to_image(space, 4, 3)]
        assert shown(page, column) == wanted
    assert [page.locator("h3").nth(i).inner_text() for i in range(3)] == [s.name for s in spaces]
    neighbour = shown(page, 1)[0][0]
    page.locator(".space").nth(1).locator(".thumb").first.click()
    page.locator("h2", has_text=neighbour).wait_for()
    assert page.locator(".note", has_text="llava:demo: no joint space").count() == 1
    sizes = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 1)")
    assert min(sizes) > 0
    watched.check()


def test_a_click_on_the_picture_moves_the_map_of_every_backbone(
    watched: Watched, caches: list[FeatureCache]
) -> None:
    page = watched.open()
    maps = page.locator(".map")
    assert maps.count() == 3

    def click(x: float, y: float, column: int) -> list[str]:
        page.wait_for_function(LOADED)
        picture = maps.nth(column).locator("img")
        box = picture.bounding_box()
        picture.click(position={"x": x * box["width"], "y": y * box["height"]})
        where = f"row {int(y * 7) + 1}, column {int(x * 7) + 1} of 7 × 7"
        for i in range(3):
            page.locator(".space").nth(i).locator(".caption", has_text=where).wait_for()
        page.wait_for_function(
            "() => [...document.querySelectorAll('.map img')].every(i => i.src.startsWith('data:'))"
        )
        return [maps.nth(i).locator("img").get_attribute("src") for i in range(3)]

    first = click(0.35, 0.5, 0)
    second = click(0.9, 0.1, 1)
    assert len({*first, *second}) == 6
    said = page.locator(".space").first.locator(".caption").first.inner_text()
    tokens = caches[0].read("image/patches", np.array([0]))[0].astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    others = np.delete(tokens @ tokens[6], 6)  # first row, last column
    assert f"{others.min():.3f} … {others.max():.3f}" in said
    page.locator(".compare").first.click()
    page.locator(".space .caption", has_text="the second picture").nth(2).wait_for()
    assert page.locator(".still img").count() == 3
    page.get_by_role("button", name="leave it").click()
    page.locator(".second").wait_for(state="detached")
    watched.check()


def test_a_cached_text_finds_images_where_there_is_a_joint_space(
    watched: Watched, caches: list[FeatureCache]
) -> None:
    page = watched.open()
    samples = samples_of(caches, None, 2000)
    spaces = spaces_of(caches, samples)
    text_id, text = next((i, t) for i, t in samples.texts.items() if t.endswith("green star"))
    page.get_by_label("words of a cached text").fill("green STAR")
    page.locator(".text", has_text=text).first.click()
    page.locator(".says", has_text=f"“{text}”").wait_for()
    answers = "article > div:last-child .spaces"
    for column in (0, 1):
        wanted = nearest_to_text(spaces[column], text_id, 3)
        assert shown(page, column, answers) == [(samples.ids[i], round(c, 3)) for i, c in wanted]
    assert "no joint space" in page.locator(answers).locator(".space").nth(2).inner_text()
    page.get_by_label("words of a cached text").fill("zebra")
    page.get_by_text("no cached text has all of these words").wait_for()
    watched.check()


def test_samples_are_found_and_turned_over(watched: Watched, caches: list[FeatureCache]) -> None:
    page = watched.open()
    ids = samples_of(caches, None, 2000).ids
    page.get_by_role("button", name="later samples").click()
    page.locator(".turn", has_text="25 – 48").wait_for()
    assert page.locator(".strip img").first.get_attribute("alt") == ids[24]
    page.get_by_label("find samples").fill(ids[40])
    page.locator(".turn", has_text="1 – 1 of 1").wait_for()
    assert page.locator(".strip img").first.get_attribute("alt") == ids[40]
    page.get_by_label("find samples").fill("nothing like it")
    page.get_by_text("none found").wait_for()
    watched.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_nothing_sticks_out_and_colours_follow_the_system(
    browser: Any, running: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE * 1000)
    watched = Watched(page, running)
    watched.open()
    page.locator(".compare").first.click()
    page.locator(".still").nth(2).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", paper)[:3]))
    assert (light > 600) == (scheme == "light")
    watched.check()
    page.close()


@contextmanager
def alone(browser: Any, cache: FeatureCache, folder: Path) -> Generator[Watched]:
    """The page of one cache."""
    with served([cache], folder) as (process, url):
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        yield Watched(page, url)
        page.close()
        assert stop(process) == (0, "\nstopped\n")


def test_strings_of_a_data_set_are_shown_as_they_are(
    browser: Any, make_cache: Callable[..., FeatureCache], tmp_path: Path
) -> None:
    """Captions are strangers' words; and here neither pictures nor a grid are at hand."""
    hostile = ["<img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "</script><b>bold</b>", *"abcdef"]
    cache = make_cache(dataset=dataset(texts=hostile, bad=(3,)))
    with alone(browser, cache, tmp_path) as watched:
        page = watched.open()
        for text in hostile[:3]:
            page.locator(".text", has_text=text).click()
            page.locator(".says", has_text=f"“{text}”").wait_for()
        assert page.locator("[src=x], b").count() == 0
        assert page.locator(".note", has_text="the pictures of stand_in cannot be read").count()
        assert page.locator(".note", has_text="in quarantine, not shown: i3: picture 3").count()
        page.wait_for_function(LOADED)
        page.locator(".map img").click()
        page.get_by_text("5 patches an image, which make no square grid").wait_for()
        watched.check()


def test_pictures_of_any_shape_and_what_was_lost_since_are_told(
    browser: Any, fast_path: Path, tmp_path: Path
) -> None:
    cache = small_caches.ragged(fast_path / "r.zarr")
    samples = samples_of([cache], None, 100)
    with alone(browser, cache, tmp_path) as watched:
        page = watched.open()
        page.locator(f".strip [alt={samples.ids[1]}]").click()
        page.locator("h2", has_text=samples.ids[1]).wait_for()
        page.wait_for_function(LOADED)
        page.locator(".map img").click()
        p, q = cache.grid()[cache.rows("image", [samples.ids[1]])[0]]
        page.get_by_text(f"of {p} × {q}").wait_for()
        shutil.rmtree(fast_path / "r.zarr" / "image" / "patches" / "c")
        page.locator(f".strip [alt={samples.ids[2]}]").click()
        page.locator("h2", has_text=samples.ids[2]).wait_for()
        page.wait_for_function(LOADED)
        page.locator(".map img").click()
        page.locator(".q-notification", has_text="image/patches").wait_for()
        watched.check()
