"""The report of the hygiene step: what each filter dropped from each source, with samples and evidence."""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

from trainer.data.jsonl import documents
from trainer.data.manifest import FileEntry, Manifest, file_entry
from trainer.files import atomic_write

SAMPLES = 3  # per filter and source
SAMPLE_CHARACTERS = 300
FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # two of them are one flag
NAMES = ("report.json", "report.md")


class Report:
    def __init__(self, raw_dir: str | Path, raw: Manifest, settings: dict[str, dict[str, Any]]) -> None:
        self._raw_dir, self._raw, self._settings = Path(raw_dir), raw, settings
        self._counts = {name: {source: [0, 0] for source in raw.sources} for name in (*settings, "all")}
        self._samples: dict[str, dict[str, list[dict[str, Any]]]] = {name: defaultdict(list) for name in settings}

    def add(self, entry: FileEntry, rows: list[dict[str, Any]]) -> None:
        """Count the dropped documents of one raw file; `rows` as the step writes them, plus the texts' bytes."""
        source, seen = entry.source or "", set[int]()
        for row in rows:
            names = [row["filter"]] if row["document"] in seen else [row["filter"], "all"]
            seen.add(row["document"])
            for name in names:
                counts = self._counts[name][source]
                counts[0], counts[1] = counts[0] + 1, counts[1] + row["bytes"]
            samples = self._samples[row["filter"]][source]
            if len(samples) < SAMPLES:
                samples.append({"file": entry.path} | row | {"start": self._start(entry.path, row["offset"])})

    def write(self, directory: Path, generation: int = 0) -> list[FileEntry]:
        """Write `report.json` and `report.md` to `directory`; after text was appended, `report-1.json` and so on."""
        names = [name.replace(".", f"-{generation}.") if generation else name for name in NAMES]
        found = {
            name: {
                source: {
                    "documents": documents_left_out,
                    "text_bytes": text_bytes,
                    "of_documents": self._raw.counts(source).documents,
                    "of_text_bytes": self._raw.counts(source).text_bytes,
                    "samples": self._samples[name][source] if name in self._samples else [],
                }
                for source, (documents_left_out, text_bytes) in by_source.items()
            }
            for name, by_source in self._counts.items()
        }
        value = {"settings": self._settings, "left_out": found}
        atomic_write(directory / names[0], json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")
        atomic_write(directory / names[1], "\n".join(self._lines(found)).encode() + b"\n")
        return [file_entry(directory, name) for name in names]

    def _lines(self, found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
        lines = ["# What training leaves out", ""]
        for name, by_source in found.items():
            lines += [f"## {name}", ""]
            lines += [f"- {key}: {value}" for key, value in self._settings.get(name, {}).items()] + [""]
            lines += ["| source | documents | of | text bytes | of | share |", "|---|---|---|---|---|---|"]
            for source, row in by_source.items():
                share = row["text_bytes"] / row["of_text_bytes"] if row["of_text_bytes"] else 0.0
                lines.append(
                    f"| {source} | {row['documents']} | {row['of_documents']} | {row['text_bytes']} "
                    f"| {row['of_text_bytes']} | {share:.2%} |"
                )
            lines.append("")
            for source, row in by_source.items():
                for sample in row["samples"]:
                    evidence = {k: v for k, v in sample.items() if k not in ("file", "document", "start", "filter")}
                    lines += [
                        f"{source}, `{sample['file']}` document {sample['document']}: "
                        f"`{json.dumps(evidence, ensure_ascii=False)}`",
                        "",
                        *("    " + line for line in sample["start"].splitlines()),
                        "",
                    ]
        return lines

    def _start(self, path: str, offset: int) -> str:
        _, text = next(documents(self._raw_dir / path, offset))
        return beginning(text, SAMPLE_CHARACTERS)


def beginning(text: str, length: int) -> str:
    """At most `length` characters of a text, not cut within a grapheme cluster (roughly UAX #29)."""
    end = min(length, len(text))
    while 0 < end < len(text) and _is_within(text, end):
        end -= 1
    return text[: end or length]


def _is_within(text: str, at: int) -> bool:
    one, after = text[at - 1], text[at]
    mark = unicodedata.category(after).startswith("M") or after in "\u200c\u200d" or one + after == "\r\n"
    emoji = "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f"
    emoji = emoji or (one == "\u200d" and not after.isalnum())
    hangul = (_jamo(one)[-1:], _jamo(after)[:1]) in (("L", "L"), ("L", "V"), ("V", "V"), ("V", "T"), ("T", "T"))
    flags = len(text[:at]) - len(text[:at].rstrip(FLAG_LETTERS))
    return mark or emoji or hangul or (after in FLAG_LETTERS and flags % 2 == 1)


def _jamo(character: str) -> str:
    """The jamo type of a Hangul character in UAX #29: leading, vowel, trailing; "" for other characters."""
    if "가" <= character <= "힣":
        return "LVT" if (ord(character) - ord("가")) % 28 else "LV"
    kinds = {"L": ("\u1100", "\u115f"), "V": ("\u1160", "\u11a7"), "T": ("\u11a8", "\u11ff")}
    return next((kind for kind, (first, last) in kinds.items() if first <= character <= last), "")
