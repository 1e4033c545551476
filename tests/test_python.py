"""From Python and in a notebook: `import plainllama`, and each stage's run(config)."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, save_random
from training import small_config

import plainllama
import runs
import sample
import train
import visualize
from plainllama.metrics import read_metrics
from plainllama.terminal import UserError


@pytest.fixture
def step(tmp_path) -> Path:
    """A checkpoint of a run called out/tiny, of random weights and bytes."""
    return save_random(tmp_path / "out/tiny/step_000600")


def test_importing_the_package_imports_neither_torch_nor_a_stage():
    code = "import sys, plainllama; print({'torch', 'numpy', 'train', 'model'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_what_is_loaded_writes_what_transformers_does(step):
    from transformers import AutoModelForCausalLM

    model, tokenizer = plainllama.load(step, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(step).eval()
    ids = torch.tensor([tokenizer.encode("the dog")])
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 7:]
    greedy = plainllama.generate(model, tokenizer, "the dog", max_new_tokens=20, temperature=0)
    assert greedy == tokenizer.decode([id for id in expected.tolist() if id != 256])
    assert not model.training


def test_a_run_a_step_a_text_and_a_path_are_the_same_model(step):
    found = [plainllama.load(ckpt) for ckpt in (step.parent, str(step.parent), step, str(step))]
    texts = [plainllama.generate(*one, "a", max_new_tokens=9, seed=1) for one in found]
    assert len({*texts}) == 1 and texts[0]
    with pytest.raises(UserError, match="nowhere"):
        plainllama.load(step.parents[2] / "nowhere")


def test_several_samples_and_stop_strings(step):
    both = plainllama.load(step)
    three = plainllama.generate(*both, "a", max_new_tokens=9, seed=1, num_samples=3)
    assert three[0] == plainllama.generate(*both, "a", max_new_tokens=9, seed=1)
    assert len({*three}) == 3
    stopped = plainllama.generate(*both, "a", max_new_tokens=9, seed=1, stop=[three[0][2]])
    assert three[0].startswith(stopped) and len(stopped) <= 2
    with pytest.raises(UserError, match="temperature=-1"):
        plainllama.generate(*both, "a", temperature=-1)


def test_the_codes_of_the_page_about_python_run(step, monkeypatch, capsys):
    monkeypatch.chdir(step.parents[2])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/PYTHON.md").read_text("utf-8"), re.S)
    names = {}
    for block in blocks:
        # Of the one that trains, the imports.
        exec(block.partition("\n\n")[0] if "PrepareConfig" in block else block, names)
    assert names["loss"].requires_grad and names["losses"] == []


def test_stages_run_many_times_in_one_process(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a notebook's own", "--f=kernel.json"])
    out = tmp_path / "out/one"
    config = replace(small_config(data_dir), out_dir=str(out), max_steps=2, checkpoint_interval=0)
    train.run(config)
    train.run(replace(config, out_dir=str(tmp_path / "out/two")))
    with pytest.raises(UserError, match="add --resume"):
        train.run(config)
    with pytest.raises(UserError, match="not finite") as kept:  # its frames, and what they hold
        train.run(replace(config, resume=True, max_steps=6, lr=1e30))
    assert kept.tb
    train.run(replace(config, resume=True, max_steps=4))  # while the other error is remembered
    assert [r["step"] for r in read_metrics(out) if "loss" in r][-1] == 4
    for _ in range(2):
        sample.run(sample.SampleConfig(ckpt=str(out), prompt="the", max_new_tokens=4))
        visualize.run(visualize.VisualizeConfig(ckpt=str(out), prompt=("the",)))
        runs.run(runs.RunsConfig(inputs=(str(tmp_path / "out"),)))
    assert capsys.readouterr().out.count("finished") == 4
