"""A page of the report as elements and text, read by the standard library's parser; pages without figures."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest

from t2i_lm.reporting.images import PageImage

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Element:
    """A tag with its attributes and content."""

    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts()).split())

    def texts(self) -> list[str]:
        return [t for one in self.children for t in ([one] if isinstance(one, str) else one.texts())]

    def all(self, tag: str = "", **attributes: str) -> list["Element"]:
        """Elements below of a tag with attributes; underscores in their names stand for hyphens."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        found = []
        for one in self.children:
            if isinstance(one, Element):
                if (not tag or one.tag == tag) and wanted.items() <= one.attributes.items():
                    found.append(one)
                found += one.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> "Element":
        (found,) = self.all(tag, **attributes)
        return found


class Page(HTMLParser):
    """Builds the tree of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, [one.tag for one in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, (self.open[-1].tag, tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    """An image of one pixel in place of each figure of a page, for tests that do not look at them."""
    patch.setattr("t2i_lm.reporting.figures.figure_image", lambda figure: PageImage(PIXEL, 1, 1, True))


def parse(text: str) -> Element:
    return Page(text).root
