"""Make the sample corpus from Debian documentation packages, the Python standard library and generated exercises.

    cd /tmp/packages && apt-get download apache2-doc libreoffice-help-ko python3.11-doc libpython3.11-{stdlib,minimal}
    for f in *.deb; do dpkg-deb -x "$f" tree; done
    python makers/sample_corpus.py /tmp/packages/tree

The same package versions give the same files: the order is sorted or seeded, and gzip contains no time. README.md
beside the corpus, in components/download/sample, records the versions, licences and origins of the committed files.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from sample_exercises import exercises

SAMPLE = Path(__file__).parents[1] / "components" / "download" / "sample"
MIN_CHARACTERS, MAX_CHARACTERS, COMFORTABLE_CHARACTERS = 200, 20_000, 6_000
BLOCKS = {
    "p",
    "div",
    "section",
    "li",
    "dt",
    "dd",
    "pre",
    "table",
    "ul",
    "ol",
    "dl",
    "blockquote",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
}
SKIPPED_TAGS = {"script", "style", "nav", "header", "footer", "aside", "form", "button", "svg"}
SKIPPED_CLASSES = {
    # navigation and other page elements of LibreOffice help, the Apache manual and Sphinx pages
    "relatedtopics", "howtoget", "debug", "bug", "noteicon", "index-label", "toplang", "bottomlang", "top", "up",
    "menu", "apache", "permalink", "headerlink", "seealso", "sphinxsidebar", "related", "contents", "toctree-wrapper",
    "linenos", "versionmodified",
}  # fmt: skip
SKIPPED_IDS = {"quickview", "path", "page-header", "footer", "comments_section"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Block(NamedTuple):
    kind: str  # heading, label (a short paragraph without an end), paragraph, item, row or code
    text: str


class Extractor(HTMLParser):
    """The text blocks of a page, from the element whose id or role is in `mains`."""

    def __init__(self, mains: set[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.mains, self.blocks = mains, list[Block]()
        self.buffer, self.kind, self.prefix = list[str](), "paragraph", ""
        self.main_depth = self.row_depth = 0
        self.skip = ("", 0)  # (tag, depth) of the element being skipped
        self.main_tag = ""
        self.lists = list[int]()  # one counter per open list; -1 for bullets

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if not self.main_depth:
            if self.mains & {given.get("id", ""), given.get("role", "")}:
                self.main_tag, self.main_depth = tag, 1
            return
        self.main_depth += tag == self.main_tag
        if self.skip[1]:
            self.skip = (self.skip[0], self.skip[1] + (tag == self.skip[0]))
        elif tag not in VOID and self._furniture(tag, given):
            self.skip = (tag, 1)
        elif tag == "tr":
            self._flush()
            self.row_depth += 1
        elif tag in ("td", "th") and self.row_depth:
            self.buffer.append(" | " if "".join(self.buffer).strip() else "")
        elif tag == "br":
            self.buffer.append("\n" if self.kind == "code" else " ")
        elif tag in BLOCKS and not self.row_depth:
            self._flush()
            self._open(tag, given)
        elif tag in BLOCKS:
            self.buffer.append(" ")

    def _furniture(self, tag: str, given: dict[str, str]) -> bool:
        hidden = "hidden" in given or given.get("id") in SKIPPED_IDS
        return hidden or tag in SKIPPED_TAGS or bool(SKIPPED_CLASSES & set(given.get("class", "").split()))

    def _open(self, tag: str, given: dict[str, str]) -> None:
        if tag in ("ul", "ol"):
            self.lists.append(0 if tag == "ol" else -1)
        elif tag == "li" and self.lists:
            numbered = self.lists[-1] >= 0
            self.lists[-1] += numbered
            self.prefix = f"{self.lists[-1]}. " if numbered else "- "
        elif tag[0] == "h":
            self.kind = "heading"
        elif tag == "pre" or "code" in given.get("class", "").split():
            self.kind = "code"

    def handle_endtag(self, tag: str) -> None:
        if not self.main_depth:
            return
        self.main_depth -= tag == self.main_tag
        if self.skip[1]:
            self.skip = (self.skip[0], self.skip[1] - (tag == self.skip[0]))
        elif tag == "tr" and self.row_depth:
            self.kind = "row"
            self._flush()
            self.row_depth -= 1
        elif tag in BLOCKS and not self.row_depth:
            self._flush()
            if tag in ("ul", "ol") and self.lists:
                self.lists.pop()

    def handle_data(self, data: str) -> None:
        if self.main_depth and not self.skip[1]:
            self.buffer.append(data)

    def _flush(self) -> None:
        text = "".join(self.buffer).replace("\u00ad", "").replace("\u200b", "").replace("\xa0", " ")
        if self.kind == "code":
            text = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        else:
            text = " ".join(text.replace("¶", "").split()).replace(": | ", ": ")
        if text.strip(" |-*."):
            kind = "item" if self.prefix and self.kind == "paragraph" else self.kind
            if kind == "paragraph" and len(text) < 30 and not text.endswith((".", "?", "!", ":")):
                kind = "label"
            self.blocks.append(Block(kind, unicodedata.normalize("NFC", self.prefix + text)))
            self.prefix = ""
        self.buffer, self.kind = [], "paragraph"


def is_korean(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return sum("가" <= c <= "힣" for c in letters) > 0.35 * len(letters)


def kept(blocks: list[Block], seen: set[str], korean: bool) -> list[Block]:
    """Drop repeated and (for `korean`) untranslated blocks.

    Code is dropped with the text before it, a heading or label with the text after it.
    """
    keep, last = list[bool](), False
    for kind, text in blocks:
        example = kind == "code" or (korean and not re.search("[가-힣]", text) and not text.endswith("."))
        if kind in ("heading", "label"):
            last = False
        elif not example:
            last = (not korean or is_korean(text)) and not (len(text) >= 40 and text in seen)
            seen.add(text)
        keep.append(last)
    for i in reversed(range(len(blocks) - 1)):
        if blocks[i].kind == "heading" or (
            blocks[i].kind == "label" and blocks[i + 1].kind not in ("heading", "label")
        ):
            keep[i] = keep[i + 1] and blocks[i].text != blocks[i + 1].text
    return [block for block, chosen in zip(blocks, keep, strict=True) if chosen]


def documents(blocks: list[Block]) -> Iterator[str]:
    """Texts of 200 to 20,000 characters; long pages are split at headings."""
    text, previous = "", ""
    for kind, block in blocks:
        full = len(text) + len(block) > MAX_CHARACTERS
        if full or (kind == "heading" and previous != "heading" and len(text) > COMFORTABLE_CHARACTERS):
            yield text
            text = ""
        tight = kind == previous and kind in ("item", "row")
        text += ("\n" if tight else "\n\n") * bool(text) + block
        previous = kind
    yield text


def is_prose(text: str) -> bool:
    """Whether more than half of the text is in lines long enough to be sentences."""
    return sum(len(line) for line in text.split("\n") if len(line) > 30) > 0.6 * len(text)


def decoded(page: bytes) -> str:
    declared = re.search(rb"charset=[\"']?([\w-]+)", page[:2000])
    return page.decode(declared[1].decode() if declared else "utf-8")


def pages(
    root: Path, folder: str, patterns: list[str], mains: set[str], package: str, licence: str, korean: bool
) -> Iterator[dict]:
    seen: set[str] = set()
    for path in sorted({p for pattern in patterns for p in (root / folder).glob(pattern)}):
        extractor = Extractor(mains)
        extractor.feed(decoded(path.read_bytes()))
        extractor._flush()
        for text in documents(kept(extractor.blocks, seen, korean)):
            if is_prose(text):
                yield {"text": text, "source": f"{package}/{path.relative_to(root / folder)}", "licence": licence}


def modules(root: Path) -> Iterator[dict]:
    """Standard library files without a copyright notice other than Python's own."""
    folder = root / "usr/lib/python3.11"
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text("utf-8", errors="replace")
        foreign = re.search(
            r"copyright|licen[sc]e", re.sub(r".*Python Software Foundation.*|.*PSF.*", "", text), re.IGNORECASE
        )
        if "\ufffd" not in text and not foreign and not {"test", "encodings"} & set(path.parts):
            yield {"text": text, "source": f"libpython3.11-stdlib/{path.relative_to(folder)}", "licence": "PSF-2.0"}


def write(name: str, corpora: Iterable[tuple[Iterable[dict], int]]) -> None:
    """Write the documents of each corpus in seeded order, up to its number of UTF-8 bytes, as a gzip without a time."""
    chosen, texts = list[dict](), set[str]()
    for corpus, limit in corpora:
        pool = [d for d in corpus if MIN_CHARACTERS <= len(d["text"]) <= MAX_CHARACTERS]
        random.Random(0).shuffle(pool)
        for document in pool:
            size = len(document["text"].encode())
            if size <= limit and document["text"] not in texts:
                chosen.append(document)
                texts.add(document["text"])
                limit -= size
    random.Random(1).shuffle(chosen)
    data = packed(chosen)
    (SAMPLE / f"{name}.jsonl.gz").write_bytes(data)
    size = sum(len(text.encode()) for text in texts)
    print(f"{name}: {len(chosen)} documents, {size} bytes of text, {len(data)} compressed")


def packed(rows: Iterable[dict[str, object]]) -> bytes:
    """JSON lines, compressed by gzip without a time."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=9, mtime=0, filename="") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return stream.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample corpus; see the docstring of this file.")
    parser.add_argument("tree", type=Path, help="where the packages were extracted")
    root = parser.parse_args().tree
    doc = "usr/share/doc"
    apache, sphinx = f"{doc}/apache2-doc/manual", f"{doc}/python3.11/html"
    chapters = [
        f"{chapter}/*.html" for chapter in ("tutorial", "howto", "faq", "reference", "using", "extending", "whatsnew")
    ]
    office = "usr/share/libreoffice/help/ko/text"
    write(
        "ko",
        [
            (pages(root, office, ["**/*.html"], {"DisplayArea"}, "libreoffice-help-ko", "MPL-2.0", True), 1_700_000),
            (
                pages(root, f"{apache}/ko", ["**/*.html"], {"page-content"}, "apache2-doc/ko", "Apache-2.0", True),
                900_000,
            ),
        ],
    )
    write(
        "en",
        [
            (pages(root, sphinx, chapters, {"main"}, "python3.11-doc", "PSF-2.0", False), 900_000),
            (
                pages(root, f"{apache}/en", ["**/*.html"], {"page-content"}, "apache2-doc/en", "Apache-2.0", False),
                700_000,
            ),
        ],
    )
    write("code", [(modules(root), 1_600_000)])
    write("math", [(exercises(6_000), 1_200_000)])


if __name__ == "__main__":
    main()
