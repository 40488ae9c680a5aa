import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from isw_plugin.report.page import Picture, Section, render
from isw_plugin.report.tables import Table

EVIL = "<script>alert('x')</script> & \"quoted\" $title"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Every start tag with its attributes; ``open`` is empty where all tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Reader:
    """A page on which every text is an attack."""
    (tmp_path / "a.png").write_bytes(b"pixels")
    table = Table(EVIL, (EVIL, "n"), ((EVIL, "1"), ("plain", EVIL)))
    sections = {
        "one": Section(EVIL, EVIL, Picture(tmp_path / "a.png", EVIL, EVIL), table),
        "two": Section("Two", "only text"),
        "three": Section("Three", "wide", table=table, wide=True),
    }
    return Reader(render(EVIL, EVIL, {EVIL: EVIL}, sections, EVIL))


def test_all_tags_are_closed_in_order(page: Reader) -> None:
    assert page.open == []


def test_every_text_is_escaped(page: Reader) -> None:
    assert page.of("script") == []
    assert page.text.count(EVIL) == 18
    assert page.of("img")[0]["alt"] == EVIL


def test_pictures_are_embedded(page: Reader) -> None:
    (picture,) = page.of("img")
    kind, _, data = (picture["src"] or "").partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == b"pixels"


def test_nothing_is_loaded_from_elsewhere(page: Reader) -> None:
    assert not {"link", "iframe", "object", "video"} & {tag for tag, _ in page.tags}
    links = [target["href"] or "" for target in page.of("a")]
    assert {link for link in links if link[0] == "#"} == {"#one", "#two", "#three"}
    assert {link.partition(";")[0] for link in links if link[0] != "#"} == {"data:text/csv"}
    policies = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_page_has_an_outline(page: Reader) -> None:
    assert page.of("html") == [{"lang": "en"}]
    assert [tag for tag, _ in page.tags if tag in ("header", "nav", "main", "footer")] == [
        "header",
        "nav",
        "main",
        "footer",
    ]
    assert len(page.of("h1")) == 1
    assert [section["id"] for section in page.of("section")] == ["one", "two", "three"]
    assert {heading["id"] for heading in page.of("h2")} == {
        section["aria-labelledby"] for section in page.of("section")
    }


def test_tables_say_what_their_cells_are_of(page: Reader) -> None:
    assert [cell["scope"] for cell in page.of("th")] == 2 * ["col", "col", "row", "row"]
    assert len(page.of("td")) == 4
    assert len(page.of("caption")) == 2


def test_tables_and_values_can_be_saved() -> None:
    table = Table("t", ("", 'a "word"'), (("x, y", "1"), ("z", "2")))
    page = Reader(render("T", "", {}, {"one": Section("One", "", table=table)}, values={"accuracy": 0.5}))
    saved = {link["download"]: link["href"] or "" for link in page.of("a") if "download" in link}
    content = {name: base64.b64decode(href.partition("base64,")[2]).decode() for name, href in saved.items()}
    assert list(csv.reader(io.StringIO(content["one.csv"]))) == [["", 'a "word"'], ["x, y", "1"], ["z", "2"]]
    assert json.loads(content["report.json"]) == {"accuracy": 0.5}


def test_the_dark_turns_charts_and_leaves_colors(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    sections = {
        str(colors): Section("", "", Picture(tmp_path / "a.png", "", "", colors=colors)) for colors in (False, True)
    }
    page = render("T", "", {}, sections)
    assert [picture["class"] for picture in Reader(page).of("img")] == ["chart", "colors"]
    assert re.search(r"prefers-color-scheme: dark\)[^@]*img\.chart { filter: invert", page)
    assert "max-width: 100%" in page  # figures fit a phone


def test_an_empty_page_is_a_page() -> None:
    assert Reader(render("Title", "", {}, {})).open == []
