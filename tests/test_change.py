"""docs/CHANGE.md: each of its diffs, applied to a copy, goes through all stages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_stage
from several import SMALL

import prepare

TEXT = (ROOT / "docs" / "CHANGE.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^### (.+?)\n.*?^```diff\n(.*?)^```", TEXT, re.M | re.S)
OWN = ("Gated ReLU² in place of SiLU", "A third norm in the block")  # what no family computes
QUICK = "A third norm in the block"
FLAGS = {"Dropout of one's own": ["--embedding_dropout=0.1"], "z-loss": ["--chunked_loss"]}

STAGES = """
import json, os, signal, sys
import export, sample, train, visualize
from plainllama.huggingface import load_model
import torch, torch._dynamo  # here, and not in both processes
from pathlib import Path
from transformers import AutoModelForCausalLM

flags, take_step = json.loads(sys.argv[1]), train.take_step

def stage(main, *words):
    sys.argv = ["stage.py", *words]
    print("$", *words, flush=True)
    try:
        main()
    except ValueError as error:
        print("refused:", error, flush=True)

def killed(step, *rest):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(step, *rest)

if not (child := os.fork()):
    train.take_step = killed
    stage(train.main, *flags, "--out_dir=out/killed")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
stage(train.main, *flags, "--out_dir=out/killed", "--resume")
stage(train.main, *flags, "--out_dir=out/whole")
newest = "out/killed/step_000012"
stage(train.main, *flags, "--out_dir=out/killed", "--eval_only")
stage(sample.main, f"--ckpt={newest}", "--prompt=the", "--max_new_tokens=8", "--seed=1")
stage(export.main, f"--ckpt={newest}")
stage(visualize.main, f"--ckpt={newest}")
ours = load_model(Path(newest))
theirs = AutoModelForCausalLM.from_pretrained(newest, trust_remote_code=True).eval()
tokens = torch.arange(32).view(2, 16)
print(type(theirs).__name__, (ours(tokens)[0] - theirs(tokens).logits).abs().max().item())
"""


def changed_copy(diff: str, folder: Path) -> Path:
    """Copy the project, and apply a diff whose hunks have no line numbers."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("plainllama", "page", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for part in diff.split("--- a/")[1:]:
        header, *hunks = re.split(r"^@@.*\n", part, flags=re.M)
        path = folder / header.split("\n")[0]
        text = path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines()
            before = "\n".join(line[1:] for line in lines if line[0] in " -")
            after = "\n".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(before) == 1, f"{path.name} has {text.count(before)} of:\n{before}"
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")
    return folder


def test_the_page_has_six_changes():
    assert len(SECTIONS) == 6 and {*OWN, QUICK, *FLAGS} <= {name for name, _ in SECTIONS}


@pytest.mark.parametrize(
    "name, diff",
    [
        pytest.param(name, diff, id=name, marks=[] if name == QUICK else pytest.mark.slow)
        for name, diff in SECTIONS
    ],
)
def test_a_change_of_the_page_goes_through_all_stages(name, diff, tmp_path):
    folder = changed_copy(diff, tmp_path)
    (folder / "text.txt").write_text("the cat sees a dog. " * 300, encoding="utf-8")
    run_stage(prepare.main, folder / "text.txt", f"--out={folder / 'data'}", "--tokenizer=byte")
    flags = [*SMALL, "--data_dir=data", "--eval_tokens=0", *FLAGS.get(name, [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", STAGES, json.dumps(flags)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, resumed, whole, evaluated, sampled, exported, page = done.stdout.split("$")[1:]
    assert whole.count("checkpoints are plainllama's own") == (name in OWN)
    for file in ("model.safetensors", "train_state/optimizer.safetensors"):
        ends = [(folder / "out" / run / "step_000012" / file) for run in ("killed", "whole")]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    losses = [re.findall(r"val loss (\S+)", printed)[-1] for printed in (resumed, evaluated)]
    assert losses[0] == losses[1]  # evaluation sees neither dropout nor terms of the loss
    assert "\nthe" in sampled
    for stage in (exported, page):
        assert ("refused: out/killed/step_000012 is an architecture of its own" in stage) == (
            name in OWN
        )
    kind, difference = page.split()[-2:]
    assert kind == ("PlainllamaForCausalLM" if name in OWN else "LlamaForCausalLM")
    assert float(difference) <= 1e-5
