"""What versions before this one wrote is read, resumed and continued."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_stage
from safetensors.torch import load_file, save_file

import sample
import train
from plainllama.huggingface import load_model
from plainllama.optimizer_state import load_optimizers
from plainllama.run_directory import checkpoints, read_metrics
from plainllama.settings import UserError

OLDER = Path(__file__).parent / "fixtures" / "before_redesign"


@pytest.fixture
def data(tmp_path) -> str:
    """The older dataset, copied, because what was checked is noted beside it."""
    shutil.copytree(OLDER / "data", tmp_path / "data")
    return f"--data_dir={tmp_path / 'data'}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_older_run_is_resumed_with_its_moments_and_metrics(optimizer, data, tmp_path, capsys):
    out_dir = tmp_path / "run"
    shutil.copytree(OLDER / optimizer, out_dir)
    checkpoint = out_dir / "step_000004"
    model, config = load_model(checkpoint), train.TrainConfig(optimizer=optimizer)
    optimizers = train.make_optimizers(model, config)
    load_optimizers(model, optimizers, checkpoint)
    old = load_file(checkpoint / "train_state" / "optimizer.safetensors")
    down = model.decoder_blocks[0].ffwd.down.weight
    if optimizer == "muon":
        state = optimizers[1].state[down]["momentum_buffer"]
        assert torch.equal(state, old["1/6/mean"][0])
    else:
        assert torch.equal(optimizers[0].state[down]["exp_avg"], old["0/7/exp_avg"])
        assert optimizers[0].state[down]["step"] == 4
    run_stage(train.main, data, f"--out_dir={out_dir}", "--resume")
    records = read_metrics(out_dir)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert losses[8] < losses[5] < losses[4]
    assert [r["tokens"] for r in records if "loss" in r] == [64 * n for n in range(1, 9)]
    capsys.readouterr()
    run_stage(sample.main, f"--ckpt={out_dir}", "--prompt=the cat", "--device=cpu")
    assert capsys.readouterr().out.startswith("the cat")


def test_a_checkpoint_that_has_the_rows_of_one_matrix_alone_is_not_older_but_damaged(tmp_path):
    checkpoint = shutil.copytree(OLDER / "muon" / "step_000004", tmp_path / "step_000004")
    model = load_model(checkpoint)
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer="muon"))
    load_optimizers(model, optimizers, checkpoint)
    path = checkpoint / "train_state" / "optimizer.safetensors"
    down = model.decoder_blocks[0].ffwd.down.weight
    rows = {"decoder_blocks.0.ffwd.down.weight/row_square": torch.ones(len(down), 1)}
    save_file(load_file(path) | rows, path)
    with pytest.raises(UserError, match="damaged: it lacks the state of decoder_blocks"):
        load_optimizers(model, optimizers, checkpoint)


def test_an_older_checkpoint_starts_a_new_run(data, tmp_path):
    source = OLDER / "adamw" / "step_000004"
    more = ["--batch_size=4", "--tokens_per_step=64", "--max_steps=1", "--no-compile"]
    where = [data, f"--init_from={source}", f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
    run_stage(train.main, *where, *more)
    assert checkpoints(tmp_path / "out")[-1].name == "step_000001"
