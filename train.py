"""Train a LLaMA, GPT-2, Qwen3 or DeepSeek-V3 on prepared data, on one device or many (torchrun).

Reads data/NAME (written by prepare.py). Writes out/RUN/metrics.jsonl, one JSON object a line, and
out/RUN/step_NNNNNN/, each a Hugging Face model directory with a train_state/ to resume from.

    python train.py config/tiny.py
    torchrun --nproc_per_node=8 train.py config/medium.py --lr=1e-3
    python train.py config/tiny.py --resume

A step is one update of the weights; a micro-step is one forward and backward pass of it. The data,
seed, tokens_per_step and max_seq_len decide which windows step n reads: not the number of processes
or micro-steps, nor evaluation, nor how often the run was killed and resumed.
"""

import plainllama.startup  # noqa: F401 isort: skip (first: see there)

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from model import LLaMaTransformer, ModelConfig
from plainllama.data import Dataset, draw, read_batch, scramble
from plainllama.distributed import (
    Shard,
    agree,
    check_equal,
    ended_at_once,
    from_first,
    join,
    lost_in_one_line,
    reshard,
    set_all_reduce,
    to_full,
)
from plainllama.machine import Dtype, Machine, compile_for_training, is_compiled, set_up_machine
from plainllama.metrics import Tracker, evaluation_line, loss_of
from plainllama.muon import Muon
from plainllama.run import Run
from plainllama.settings import Values, read_arguments
from plainllama.start import (
    LOSS_CHUNKS,
    Start,
    choose_start,
    count_micro_steps,
    fit_to_data,
    load_start,
)
from plainllama.terminal import StopSignal, UserError, is_out_of_memory, run_main, say


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Train a model on prepared data."""

    # data
    data_dir: str = "data/shakespeare"  # prepared data; several: a,b as one, a:0.7,b:0.3 in shares
    eval_tokens: int = 262_144  # validation tokens in an evaluation, always the same; 0: all
    # run
    out_dir: str = "out/run"  # where checkpoints and metrics.jsonl go
    resume: bool = False  # continue the run in out_dir, with its settings
    init_from: str = ""  # start from the weights in this Hugging Face directory
    eval_only: bool = False  # evaluate init_from, or out_dir's newest checkpoint, on all of val
    max_steps: int = 1000  # steps in the whole run
    epochs: float = 0.0  # times to read the data, in place of max_steps; 0: max_steps decides
    patience: int = 0  # evaluations, none better than before, that end the run; 0: any number
    seed: int = 0  # decides the initial weights and, with the data, the windows of every step
    # batch
    tokens_per_step: int = 8192  # tokens of a step, over all micro-steps and processes
    batch_size: int = 32  # sequences per micro-step and process; changes speed and memory alone
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks
    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 100  # steps over which the rate rises linearly to lr: half a run at most
    decay_fraction: float = 1.0  # part of the run, after the warm-up, in which it falls linearly
    weight_decay: float = 0.1  # decoupled weight decay, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    momentum: float = 0.95  # Muon's decay of the mean gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    dropout: float = 0.0  # part of attention's weights, and of what layers add, that becomes 0
    # adapters
    lora_rank: int = 0  # train products of this rank beside init_from's frozen matrices; 0: all
    lora_alpha: int = 16  # a product is multiplied by lora_alpha / lora_rank
    lora_targets: str = ""  # layers, by their names in model.py: wq,wv; default: all of the blocks
    # reports
    log_interval: int = 10  # steps between log lines
    eval_interval: int = 250  # steps between evaluations; 0: only at the end
    checkpoint_interval: int = 250  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest checkpoints to keep, besides the one with the best val_loss
    sample_interval: int = 0  # steps between samples of text; 0: none
    tracker: Tracker = "none"  # where reports go as well: the package must be installed
    snapshots: int = 0  # weights to keep for visualize.py, at about so many steps from 0 on
    # machine
    device: str = "auto"  # auto (the accelerator, else the CPU), cpu, cuda, cuda:1, mps, xpu, ...
    dtype: Dtype = "auto"  # of matrix products; auto: bfloat16 where the hardware is fast at it
    compile: bool = True  # compile the model with torch.compile
    shard: Shard = "none"  # share the weights out: among all processes, or those of each node
    activation_checkpointing: bool = False  # compute blocks again in the backward pass: less memory
    chunked_loss: bool = False  # compute logits again in the backward pass, a part at a time, too

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1 = ("max_steps", "tokens_per_step", "batch_size", "log_interval", "keep_last")
        for field in fields(TrainConfig):
            value, least = getattr(self, field.name), 1 if field.name in at_least_1 else 0
            if field.type in (int, float) and value < least:
                raise UserError(f"{field.name}={value} must be at least {least}")
            if field.type is int and value > 2**63:
                raise UserError(f"{field.name}={value} must be at most 2**63")
        for key in ("beta1", "beta2", "momentum", "dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be at least 0 and below 1")
        if self.decay_fraction > 1:
            raise UserError(f"decay_fraction={self.decay_fraction} must be between 0 and 1")
        if self.patience and not self.eval_interval:
            raise UserError(f"patience={self.patience} counts evaluations: give an eval_interval")
        if self.lora_rank and self.optimizer == "muon":
            raise UserError(f"lora_rank={self.lora_rank}: adapters are trained by optimizer=adamw")
        if not self.lora_rank and (self.lora_targets or self.lora_alpha != TrainConfig.lora_alpha):
            raise UserError(
                f"lora_rank=0 trains all weights: lora_alpha={self.lora_alpha} and "
                f"lora_targets={self.lora_targets} need a rank of at least 1"
            )


def build_model(config: TrainConfig, start: Start, machine: Machine) -> LLaMaTransformer:
    """Return the model with the weights that the run begins with, on the machine's device."""
    torch.manual_seed(config.seed)
    model = load_start(config, start, machine)
    model.dropout, model.recompute = config.dropout, config.activation_checkpointing
    model.loss_chunks = LOSS_CHUNKS if config.chunked_loss else 1
    return model.train()


def window_starts(seed: int, before: np.ndarray, n_tokens: int, length: int) -> np.ndarray:
    """Return where the windows begin that have so many `before` them, of length + 1 of n_tokens.

    An epoch cuts the text into slots of at least `length` tokens, from a random place on, and reads
    a window of each slot, in random order: without replacement, and every place as likely as any.
    """
    n_places = n_tokens - length  # where a window fits
    n_slots = max(1, n_places // length)
    slot, key = draw(seed, before, n_slots)
    offset = scramble(~key) / 2.0**64  # of the epoch's slots, as a part of one
    return ((slot + offset) * (n_places / n_slots)).astype(np.int64).clip(max=n_places - 1)


def step_places(step: int, dataset: Dataset, config: TrainConfig) -> tuple[np.ndarray, int]:
    """Return the windows of a step, or its rows, and how many targets count in all of them."""
    T = config.max_seq_len
    count = config.tokens_per_step // T
    windows = np.arange(step * count, (step + 1) * count)  # since the run began
    places, offset = np.empty(count, np.int64), 0
    for number, source in enumerate(dataset.sources()):  # one, unless --data_dir has shares
        mine, before = dataset.turns(number, windows)
        if dataset.conversations:
            size = dataset.rows("train", T).counts[number]
            places[mine] = offset + draw(config.seed + number, before, size)[0]
        else:
            size = source.tokens["train"]
            places[mine] = offset + window_starts(config.seed + number, before, size, T)
        offset += size
    if dataset.conversations:
        return places, int(dataset.rows("train", T).learned[places].sum())
    return places, config.tokens_per_step


def step_batches(
    places: np.ndarray, dataset: Dataset, config: TrainConfig, machine: Machine
) -> Iterator[tuple[Tensor, ...]]:
    """Yield this process's micro-batches of a step's places: tokens, targets and, of conversations,
    positions, (B, T) each; see read_batch."""
    for mine in places.reshape(-1, machine.world_size, config.batch_size)[:, machine.rank]:
        yield read_batch(dataset, "train", mine, config.max_seq_len, machine.device)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of a step, counted from 0: it rises to lr, stays there, and falls near 0."""
    warmup = min(config.warmup_steps, config.max_steps // 2)
    decay_steps = min(config.decay_fraction * config.max_steps, config.max_steps - warmup)
    rise = (step + 1) / max(1, warmup)
    fall = (config.max_steps - step) / decay_steps if decay_steps else 1.0
    return config.lr * min(1.0, rise, fall)


def make_optimizers(model: LLaMaTransformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW (arXiv:1711.05101), and Muon for the blocks' matrices if config asks for it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = {p for p in model.decoder_blocks.parameters() if p.dim() >= 2}
    for_muon = [p for p in trained if p in hidden and config.optimizer == "muon"]
    matrices = [p for p in trained if p.dim() >= 2 and not (for_muon and p in hidden)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = model.cos.device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=fused)
    return [adamw, Muon(for_muon, config.momentum, config.weight_decay)] if for_muon else [adamw]


def take_step(
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    dataset: Dataset,
    config: TrainConfig,
    machine: Machine,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Update the weights once; return the numbers to report: metrics.jsonl names them as here.

    The first are this process's parts of sums over all targets, which the processes then add up.
    The second are the same in all processes.
    """
    loss = torch.zeros((), device=machine.device)
    micro_steps = count_micro_steps(config, machine.world_size)
    places, n_targets = step_places(step, dataset, config)
    for number, batch in enumerate(step_batches(places, dataset, config, machine)):
        of_step = number * machine.world_size + machine.rank  # which micro-batch of the step it is
        random = np.random.SeedSequence((config.seed, step, of_step))
        torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))  # for dropout
        set_all_reduce(model, number + 1 == micro_steps)
        with machine.autocast():
            _, nats = model(*batch, reduction="sum")
        part_of_loss = nats / n_targets  # the targets of all processes' micro-batches
        part_of_loss.backward()
        loss += part_of_loss.detach()
    machine.sum_gradients(model)
    norm = to_full(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"loss": loss}, {"grad_norm": norm}


def evaluation_batches(
    dataset: Dataset, config: TrainConfig, machine: Machine
) -> Iterator[tuple[Tensor, ...]]:
    """Yield this process's share of the fixed validation windows, as of read_batch, (B, T).

    The windows lie end to end, so that each token is predicted once; where eval_tokens asks for a
    part of them, it is spread evenly. Conversations are all read. Targets that do not count are
    -100. All processes yield as many batches, if need be of none that count, for a sharded model
    computes in all at once.
    """
    T, n_tokens = config.max_seq_len, dataset.tokens["val"]
    if dataset.conversations:
        wanted = len(dataset.rows("val", T))
        mine = np.arange(wanted)[machine.rank :: machine.world_size]
        last = wanted - 1
    else:
        n_windows, last = math.ceil((n_tokens - 1) / T), n_tokens - T - 1
        wanted = n_windows
        if config.eval_tokens:
            wanted = min(n_windows, max(1, config.eval_tokens // T))
        chosen = np.linspace(0, n_windows - 1, wanted).round().astype(np.int64)
        mine = T * chosen[machine.rank :: machine.world_size]
    most = math.ceil(wanted / machine.world_size)  # windows of a process
    quiet = machine.rank != 0 or not sys.stderr.isatty()
    for first in tqdm(range(0, most, config.batch_size), "evaluating", leave=False, disable=quiet):
        wished = mine[first : first + config.batch_size]
        wished = np.resize(wished, config.batch_size)  # repeats, so that all batches have one shape
        starts = np.minimum(wished, last)  # the split's last window is moved to fit
        tokens, targets, *positions = read_batch(dataset, "val", starts, T, machine.device)
        for row, counted_before in enumerate(wished - starts):
            targets[row, :counted_before] = -100
        targets[max(0, len(mine) - first) :] = -100  # the repeats
        yield tokens, targets, *positions


def evaluate(
    model: nn.Module, dataset: Dataset, config: TrainConfig, machine: Machine
) -> dict[str, float]:
    """Return loss (nats per token), perplexity and bits per byte over the validation windows.

    Those of answers have other names than those of text. Several directories share eval_tokens as
    they share the tokens of all, and each has its loss as well.
    """
    kind = "answer" if dataset.conversations else "val"
    sums, losses = np.zeros(3), {}
    model.eval()
    for part in dataset.parts():
        tokens = -(-config.eval_tokens * part.tokens["val"] // dataset.tokens["val"])  # upwards
        of_part = sum_losses(model, part, replace(config, eval_tokens=tokens), machine)
        losses[f"{kind}_loss/{part.data_dir}"] = of_part[0] / of_part[1]
        sums += of_part
    model.train()
    reshard(model)
    nats, n_tokens, n_bytes = sums.tolist()
    loss = nats / n_tokens
    perplexity = math.exp(min(loss, 700))  # exp overflows beyond
    bpb = nats / math.log(2) / max(1, n_bytes)
    whole = {f"{kind}_loss": loss, f"{kind}_perplexity": perplexity, f"{kind}_bpb": bpb}
    return whole | losses if len(losses) > 1 else whole


def sum_losses(
    model: nn.Module, dataset: Dataset, config: TrainConfig, machine: Machine
) -> list[float]:
    """Return the nats, tokens and bytes of a directory's validation windows, of all processes."""
    nats, n_tokens, n_bytes = 0.0, 0, 0
    lengths = dataset.tokenizer.token_lengths  # bytes of each id, (V,)
    for tokens, targets, *positions in evaluation_batches(dataset, config, machine):
        # Without gradients a compiled model would be compiled again, longer than it saves.
        with machine.autocast(), torch.set_grad_enabled(is_compiled(model)):
            nats += model(tokens, targets, *positions, reduction="sum")[1].item()
        counted = targets[targets >= 0].cpu().numpy()
        n_tokens += counted.size
        n_bytes += int(lengths[counted].sum())
    return machine.total(nats, n_tokens, n_bytes)


def train(config: TrainConfig, start: Start, machine: Machine, stop: StopSignal) -> None:
    """Take all steps that the run still lacks, or only evaluate it."""
    config, data = agree(lambda: fit_to_data(config, start, machine))
    check_equal({"data": data.sha256})
    model = build_model(config, start, machine)
    if config.eval_only:
        metrics = evaluate(model, data, replace(config, eval_tokens=0), machine)
        say(f"{start.directory}  {evaluation_line(metrics)}")
        if not math.isfinite(loss_of(metrics)):
            raise UserError(f"{start.directory}: validation loss {loss_of(metrics)}")
        return

    optimizers = make_optimizers(model, config)
    run = agree(lambda: Run(config, start, data, machine, stop))
    step = run.begin(model, optimizers)
    run.describe(model, count_micro_steps(config, machine.world_size))
    if config.compile and run.goes_on(step):
        compile_for_training(model, config.batch_size, machine, data.conversations is not None)
    run.save_snapshot(step, model)
    if run.lacks_evaluation(step):
        run.log_evaluation(step, evaluate(model, data, config, machine))

    run.start_steps()
    while run.goes_on(step):
        parts, wholes = take_step(step, model, optimizers, data, config, machine)
        step += 1
        run.count_step()
        if run.reports(step):
            run.log_training(step, parts, wholes, learning_rate(step - 1, config))
        with run.clock.paused():
            if run.saves(step):
                run.save(step, model, optimizers)
            run.save_snapshot(step, model)
            if run.evaluates(step):
                run.log_evaluation(step, evaluate(model, data, config, machine))
            run.show_sample(step, model)
    run.conclude(step)


def run(config: TrainConfig | None = None) -> None:
    """Train as config says, by default as the command line does.

    Where torchrun started several processes, all call this. A resumed run keeps its settings but
    for those of the command line, or of config where they are not the defaults.
    """
    join()  # first, so that one process looks at the disk for all
    try:
        files, flags = agree(lambda: settings_of(config))
        check_equal(files | flags)
        config, start = from_first(lambda: choose_start(TrainConfig, files, flags))
        if start.kind == "finished":
            return
        machine = agree(lambda: set_up_machine(config))
        with machine.attention(), StopSignal() as stop, lost_in_one_line():
            train(config, start, machine, stop)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: lower batch_size={config.batch_size} (the run "
            f"stays the same), add --activation_checkpointing or --chunked_loss, or lower "
            f"max_seq_len={config.max_seq_len}"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def settings_of(config: TrainConfig | None) -> tuple[Values, Values]:
    """Return what config files set, and what the command line, or config, sets against them."""
    if config is None:
        return read_arguments(TrainConfig)
    defaults = asdict(TrainConfig())
    return {}, {key: value for key, value in asdict(config).items() if value != defaults[key]}


def main() -> None:
    run()


if __name__ == "__main__":
    with ended_at_once():
        run_main(main)
