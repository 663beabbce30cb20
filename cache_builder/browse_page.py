"""The page of `headstart browse`: one picture, its nearest under every backbone, and where a patch has its like.

    samples | picture   a map per backbone · its k nearest       a click on a map moves the patch
            | texts     a cached text · its k nearest            a click on a neighbour goes there

NiceGUI draws it: its files come with the package, so a browser asks this process for everything, and it sends no
figures of use to anybody. Needs the extra `browse`.
"""

import base64
import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nicegui import ui
from nicegui.events import MouseEventArguments
from PIL.Image import Image

from cache_builder.browse import (
    Space,
    grid_of,
    nearest_to_image,
    nearest_to_text,
    patch_map,
    says_of,
)
from cache_builder.browse_pictures import (
    LARGE,
    MEDIA,
    SMALL,
    Pictures,
    encoded,
    mapped,
    opened,
    scaled,
    span,
)
from cache_builder.browse_samples import Samples, found_images, found_texts
from cache_builder.covered import covered
from cache_builder.errors import CacheError

SHOWN = 24
"""Samples on a page of the list."""

TEXTS = 12
"""Texts that a search shows."""

PICTURES = "/picture"
"""Address of all pictures."""

CSS = (Path(__file__).parent / "browse_page.css").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Browsed:
    """What there is to look at.

    Attributes:
        samples: the images, the same under every backbone.
        spaces: the backbones.
        pictures: pixels, where they can be had.
        k: neighbours shown.
    """

    samples: Samples
    spaces: Sequence[Space]
    pictures: Pictures
    k: int

    def address(self, image: int, pixels: int = SMALL) -> str:
        """Of the picture of an image, whose longer side has so many pixels."""
        return f"{PICTURES}/{pixels}/{image}"


class Page:
    """What one tab of a browser shows: the sample, the patch, the second picture, the text that were picked."""

    def __init__(self, browsed: Browsed) -> None:
        self.browsed = browsed
        self.image = 0
        self.point: tuple[float, float] | None = None
        self.second: int | None = None
        self.text: str | None = None
        self.listed: Sequence[int] = range(len(browsed.samples.ids))
        self.first = 0
        ui.add_css(CSS)
        with ui.element("header"):
            ui.element("h1").props["textContent"] = "headstart browse"
            ui.label(_counts(browsed)).classes("quiet")
            self._notes()
        with ui.element("div").classes("halves"):
            with ui.element("nav").props('aria-label="samples"'):
                self._search("find samples by id, split or label", self._find)
                self.list = ui.element("div").classes("list")
            with ui.element("article"):
                self.detail = ui.element("div")
                if any(space.is_joint for space in browsed.spaces):
                    self._texts()
        self._list()
        self._show()

    def _notes(self) -> None:
        """What is missing, and why."""
        browsed = self.browsed
        lines = [f"{space.name}: {lack}" for space in browsed.spaces for lack in space.lacks]
        lines += [browsed.pictures.missing] if browsed.pictures.missing else []
        bad = list(browsed.samples.bad.items())
        lines += [f"in quarantine, not shown: {name}: {why}" for name, why in bad[:5]]
        lines += [f"… and {len(bad) - 5} more in quarantine"] if len(bad) > 5 else []
        for line in lines:
            ui.label(line).classes("note")

    def _search(self, label: str, then: Callable[[str], None]) -> None:
        box = ui.input(placeholder=label).props("dense outlined clearable debounce=300")
        box.props["aria-label"] = label
        box.on_value_change(lambda event: then(str(event.value or "")))

    def _find(self, words: str) -> None:
        self.listed, self.first = found_images(self.browsed.samples, words), 0
        self._list()

    def _list(self) -> None:
        """A page of samples."""
        self.list.clear()
        end = min(self.first + SHOWN, len(self.listed))
        with self.list:
            with ui.element("div").classes("turn"):
                self._turn("‹", "earlier samples", -SHOWN, self.first > 0)
                where = f"{self.first + 1} – {end} of {len(self.listed):,}"
                ui.label(where if self.listed else "none found")
                self._turn("›", "later samples", SHOWN, end < len(self.listed))
            with ui.element("div").classes("thumbs strip"):
                for image in self.listed[self.first : end]:
                    self._thumb(image, says_of(self.browsed.samples, image)["id"])

    def _turn(self, sign: str, says: str, by: int, on: bool) -> None:
        def turn() -> None:
            self.first += by
            self._list()

        button = ui.button(sign, on_click=turn, color=None).props("flat dense no-caps")
        button.props["aria-label"] = says
        button.set_enabled(on)

    def _thumb(self, image: int, caption: str, second: bool = False) -> None:
        """A small picture that is a button; `second`: with one more that takes it as the second picture."""
        said = says_of(self.browsed.samples, image)
        with ui.element("figure"):
            button = ui.element("button").classes("thumb")
            button.props["title"] = f"{said['id']} · {said['says']}"
            button.on("click", lambda: self._pick(image))
            with button:
                picture = ui.element("img").props('loading="lazy"')
                picture.props["src"] = self.browsed.address(image)
                picture.props["alt"] = said["id"]
            ui.label(caption).classes("caption")
            if second:
                ui.label(said["says"].partition(" · ")[0]).classes("caption quiet")
                compare = ui.button("compare", on_click=lambda: self._compare(image), color=None)
                compare.classes("compare").props("flat dense no-caps")
                compare.props["aria-label"] = f"compare patches with {said['id']}"

    def _pick(self, image: int) -> None:
        self.image, self.point, self.second = image, None, None
        self._show()

    def _compare(self, image: int) -> None:
        self.second = image
        if self.point is None:
            self.point = (0.5, 0.5)
        self._show()

    def _show(self) -> None:
        """The sample that was picked, under every backbone."""
        said = says_of(self.browsed.samples, self.image)
        self.detail.clear()
        with self.detail:
            ui.element("h2").props["textContent"] = said["id"]
            ui.label(" — ".join(filter(None, (said["split"], said["says"])))).classes("says")
            if self.second is not None:
                other = says_of(self.browsed.samples, self.second)
                with ui.element("div").classes("second"):
                    ui.label(f"second picture: {other['id']} — {other['says']}")
                    ui.button("leave it", on_click=self._leave, color=None).props(
                        "flat dense no-caps"
                    )
            self.picture = scaled(self._pixels(self.image), LARGE)
            with ui.element("div").classes("spaces"):
                self.maps = [self._space(space) for space in self.browsed.spaces]
        self._map()

    def _leave(self) -> None:
        self.second = None
        self._show()

    def _pixels(self, image: int) -> Image | None:
        return opened(self.browsed.pictures, self.browsed.samples.ids[image])

    def _space(
        self, space: Space
    ) -> "tuple[ui.interactive_image, ui.label, ui.interactive_image | None]":
        """A backbone's column; returns what a click changes."""
        with ui.element("section").classes("space"):
            ui.element("h3").props["textContent"] = space.name
            shown = ui.interactive_image(on_mouse=self._point).classes("map")
            shown.props["aria-label"] = f"picture under {space.name}"
            says = ui.label().classes("caption")
            second = None
            if self.second is not None and space.has_patches:
                second = ui.interactive_image().classes("map still")
            if space.images is not None:
                ui.label(f"nearest by cosine of {space.of}").classes("quiet")
                with ui.element("div").classes("thumbs"), self._told():
                    for image, cosine in nearest_to_image(space, self.image, self.browsed.k):
                        self._thumb(image, f"{cosine:.3f}", second=space.has_patches)
        return shown, says, second

    def _point(self, event: MouseEventArguments) -> None:
        width, height = self.picture.size
        self.point = (event.image_x / width, event.image_y / height)
        self._map()

    def _map(self) -> None:
        """Every backbone's map of the point that was clicked."""
        for space, (shown, says, second) in zip(self.browsed.spaces, self.maps, strict=True):
            shown.set_source(self.browsed.address(self.image, LARGE))
            if not space.has_patches:
                says.set_text("this cache holds no patches")
            elif self.point is None:
                says.set_text(
                    "click a point of the picture: bright patches are like it, dark ones are not"
                )
            else:
                with self._told():
                    self._map_one(space, shown, says, second, self.point)

    def _map_one(
        self,
        space: Space,
        shown: ui.interactive_image,
        says: ui.label,
        second: ui.interactive_image | None,
        point: tuple[float, float],
    ) -> None:
        cache, row = space.cache, int(space.rows[self.image])
        try:
            grid = grid_of(cache, row)
        except CacheError as error:
            says.set_text(str(error))
            return
        preprocessing = cache.spec.backbone.preprocessing
        box = covered(*self.picture.size, preprocessing)
        patch = grid.patch_at(*box.within(*point))
        if patch is None:
            says.set_text("this backbone does not see that point: its preprocessing cuts it off")
            return
        cosines = patch_map(cache, row, patch)
        shown.set_source(_inline(mapped(self.picture, grid, box, cosines, patch)))
        (p, q), (low, high) = grid.shape, span(cosines, patch)
        text = f"row {patch // q + 1}, column {patch % q + 1} of {p} × {q}; the others {low:.3f} … {high:.3f}"
        if second is not None and self.second is not None:
            other = int(space.rows[self.second])
            picture = scaled(self._pixels(self.second), LARGE)
            there = patch_map(cache, row, patch, other)
            away = covered(*picture.size, preprocessing)
            second.set_source(_inline(mapped(picture, grid_of(cache, other), away, there)))
            text += "; the second picture {:.3f} … {:.3f}".format(*span(there))
        says.set_text(text)

    def _texts(self) -> None:
        """Cached texts, and the images nearest to the one that was picked."""
        ui.element("h2").props["textContent"] = "From a text to images"
        self._search("words of a cached text", self._find_texts)
        self.found = ui.element("div").classes("texts")
        self.answers = ui.element("div")
        self._find_texts("")

    def _find_texts(self, words: str) -> None:
        texts = found_texts(self.browsed.samples, words, TEXTS)
        self.found.clear()
        with self.found:
            for text_id, text in texts:
                pick = functools.partial(self._pick_text, text_id)
                ui.button(text, on_click=pick, color=None).props("outline dense no-caps").classes(
                    "text"
                )
            if not texts:
                ui.label("no cached text has all of these words").classes("quiet")

    def _pick_text(self, text_id: str) -> None:
        self.text = text_id
        self.answers.clear()
        with self.answers:
            ui.label(f"“{self.browsed.samples.texts[text_id]}”").classes("says")
            with ui.element("div").classes("spaces"):
                for space in self.browsed.spaces:
                    self._answer(space, text_id)

    def _answer(self, space: Space, text_id: str) -> None:
        with ui.element("section").classes("space"):
            ui.element("h3").props["textContent"] = space.name
            if not space.is_joint:
                ui.label("no joint space of images and texts in this cache").classes("quiet")
                return
            with ui.element("div").classes("thumbs"), self._told():
                for image, cosine in nearest_to_text(space, text_id, self.browsed.k):
                    self._thumb(image, f"{cosine:.3f}")

    @contextmanager
    def _told(self) -> Generator[None]:
        """What cannot be read, as a sentence on the page."""
        try:
            yield
        except (CacheError, OSError) as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=0, close_button="close")


def _counts(browsed: Browsed) -> str:
    samples, spec = browsed.samples, browsed.spaces[0].cache.spec
    n = len(samples.ids)
    of = f"{n:,}" if n == samples.total else f"the first {n:,} in row order, of {samples.total:,}"
    return (
        f"{spec.dataset.name}: {of} images, {len(samples.texts):,} texts, {len(samples.bad)} in quarantine; "
        f"{len(browsed.spaces)} {'cache' if len(browsed.spaces) == 1 else 'caches'}"
    )


def _inline(picture: Image) -> str:
    return f"data:{MEDIA};base64,{base64.b64encode(encoded(picture)).decode()}"
