"""A run's directory as it is written: reports, checkpoints, and which of them are kept.

out/RUN/settings.json        the settings that it was last started with
out/RUN/metrics.jsonl        one JSON object a report: training, or an evaluation
out/RUN/step_NNNNNN/         checkpoints: see plainllama/checkpoint.py
out/RUN/snapshots/step_*/    weights at early and late steps, to look at; never pruned
"""

import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import LLaMaTransformer
from plainllama.checkpoint import (
    best_checkpoint,
    checkpoints,
    last_checkpoint,
    load_optimizers,
    optimizer_tensors,
    prune,
    read_state,
    remove_leftovers,
    rename_into_place,
    seal,
    step_of,
)
from plainllama.data import Dataset, lock
from plainllama.distributed import agree, from_first, generating, resume_command, to_full, to_local
from plainllama.generation import continue_text
from plainllama.huggingface import save_model, side_files
from plainllama.lora import peft_lacks, save_adapter
from plainllama.machine import Machine, flops_per_token, n_params
from plainllama.metrics import Clock, Metrics, evaluation_line, loss_of, val_losses
from plainllama.settings import write_json
from plainllama.start import Start, base_sums
from plainllama.tensors import save_tensors, stored_tensors
from plainllama.terminal import StopSignal, UserError, command, say, warning


class Run:
    """A run that goes on from its start: its bar, clock, metrics, checkpoints and end.

    All processes have one and call it alike; the first alone writes.
    """

    def __init__(
        self, config: Any, start: Start, data: Dataset, machine: Machine, stop: StopSignal
    ) -> None:
        self.config, self.start, self.data = config, start, data
        self.machine, self.stop = machine, stop
        self.out_dir = Path(config.out_dir)
        self.state = read_state(start.directory) if start.kind == "resume" else {}
        self.first = self.reported = self.state.get("step", 0)
        self.snapshots = snapshot_steps(config.snapshots, config.max_steps)
        self.files = side_files(config, data.tokenizer, start.directory, data.template)
        self.stopping = self.out_of_patience = False
        self.writes = machine.rank == 0
        self.clock = Clock(self.state.get("seconds", 0.0))
        self.metrics = Metrics(config, self.writes)
        if not self.writes:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        stop.callback(lock(self.out_dir / ".lock", str(self.out_dir)).release)
        if step_of((checkpoints(self.out_dir) or [Path()])[-1]) > self.first:
            raise UserError(f"another process has written to {self.out_dir} meanwhile; start again")
        taken = self.out_dir.glob("snapshots/step_*")  # of which later ones will be taken again
        later = [path for path in taken if step_of(path) > self.first or not self.state]
        remove_leftovers(self.out_dir, later)
        with warning(f"{self.out_dir}/settings.json is left as it was"):
            write_json(self.out_dir / "settings.json", asdict(config))
        self.metrics.begin(self.first)
        self.base = self.state.get("base") or base_sums(config)

    def begin(self, model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer]) -> int:
        """Read back the optimizers; return the steps taken."""
        if self.state:
            load_optimizers(model, optimizers, self.start.directory)
        self.peak_speed = self.machine.peak_flops() / flops_per_token(model)  # tokens/s, 0: unknown
        self.stop.listen(lambda: last_checkpoint(self.out_dir))
        self.check_patience()
        return self.first

    def describe(self, model: LLaMaTransformer, micro_steps: int) -> None:
        """Print what is about to be trained, on what, and how a step is made up; warn of mistakes.

        A step has `micro_steps` forward and backward passes.
        """
        config, data, machine = self.config, self.data, self.machine
        tokens, T = config.max_steps * config.tokens_per_step, config.max_seq_len
        pairs = list(zip(data.shares(), data.sources(), strict=True))
        epochs = [tokens * share / source.epoch_tokens(T) for share, source in pairs]
        shares = "".join(
            f"         {share:.1%} {source.data_dir}, {times:.3g} epochs\n"
            for (share, source), times in zip(pairs, epochs, strict=True)
            if len(pairs) > 1
        )
        whole = tokens / data.epoch_tokens(T)
        compiled = "torch.compile" if config.compile else "eager"
        rows = data.rows("train", T).described() if data.conversations else ""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        of_them = f" ({trained:,} of them trained)" if config.lora_rank else ""
        say(
            f"model    {n_params(model):,} parameters{of_them}, {config.n_layers} layers, "
            f"{config.n_embd} wide, {flops_per_token(model) / 1e6:,.1f} MFLOPs/token\n"
            f"data     {config.data_dir}, vocabulary {data.vocab_size:,}\n"
            f"         {data.tokens['train']:,} training tokens, "
            f"{data.tokens['val']:,} validation tokens\n{shares}{rows}"
            f"step     {config.tokens_per_step:,} tokens = {config.batch_size} sequences × "
            f"{T:,} × {micro_steps} micro-step{'s' * (micro_steps > 1)} × "
            f"{machine.world_size} process{'es' * (machine.world_size > 1)}\n"
            f"run      {config.max_steps:,} steps = {whole:.3g} epochs, into {config.out_dir}\n"
            f"machine  {machine.device}, {str(machine.dtype).removeprefix('torch.')}, {compiled}"
        )
        adapters = stored_tensors(model, adapters=True)
        if adapters and (reason := peft_lacks(adapters, config)):
            say(f"checkpoints are whole models, without adapter/: {reason}")
        if max(epochs) > 20:
            fewer = max(1, round(4 * config.max_steps / max(epochs)))
            say(
                f"warning: a text that is read {max(epochs):,.0f} times is learned by heart;\n"
                "         config/book.py delays that, --patience=3 stops in time, "
                f"--max_steps={fewer} reads it 4 times"
            )
        half = config.max_steps // 2
        if config.warmup_steps > half:
            say(f"warning: warmup_steps={config.warmup_steps} is cut to {half}, half of the run")

    def start_steps(self) -> None:
        """Begin to count time, and to save where a signal comes."""
        quiet = not self.writes or not sys.stderr.isatty()
        total = self.config.max_steps
        self.bar = tqdm(total=total, initial=self.first, unit="step", disable=quiet)
        self.stop.stepping = True
        self.began = time.perf_counter()
        self.clock.lap()

    def goes_on(self, step: int) -> bool:
        """Tell whether there is a step to take after `step`."""
        return step < self.config.max_steps and not (self.stopping or self.out_of_patience)

    def count_step(self) -> None:
        """Note that a step is done, and whether a signal came in any process."""
        self.bar.update()
        self.stopping = self.machine.total(self.stop.came)[0] > 0

    def is_due(self, step: int, *intervals: int) -> bool:
        """Tell whether what happens every so many steps (0: never) does so after `step`.

        It does in any case after the last step, and after the one at which the run stops.
        """
        regular = any(interval > 0 and step % interval == 0 for interval in intervals)
        return regular or self.stopping or step == self.config.max_steps

    def reports(self, step: int) -> bool:
        """Tell whether the training of the steps up to `step` is reported."""
        return step == self.first + 1 or self.is_due(step, self.config.log_interval)

    def saves(self, step: int) -> bool:
        """Tell whether a checkpoint is written after `step`: with patience, before evaluations."""
        evaluated = self.config.eval_interval if self.config.patience else 0
        return self.is_due(step, self.config.checkpoint_interval, evaluated)

    def evaluates(self, step: int) -> bool:
        """Tell whether the model is evaluated after `step`."""
        return self.is_due(step, self.config.eval_interval) and not self.stopping

    def lacks_evaluation(self, step: int) -> bool:
        """Tell whether an evaluation was due at the step that the run goes on from, and is lacking.

        A kill came between saving and evaluating.
        """
        is_due = step > 0 and self.evaluates(step)
        return is_due and step not in from_first(lambda: val_losses(self.out_dir))

    def tokens(self, step: int) -> int:
        """Return how many tokens the run has read after `step`."""
        return self.state.get("tokens", 0) + (step - self.first) * self.config.tokens_per_step

    def log_training(
        self, step: int, parts: dict[str, Tensor], wholes: dict[str, Tensor], lr: float
    ) -> None:
        """Record the numbers of the step just taken (see take_step) and the speed since the last.

        The line shows loss and grad_norm in their places, and all others after them.
        """
        sums = self.machine.total(*map(float, parts.values()))
        numbers = dict(zip(parts, sums, strict=True))
        numbers |= {name: float(value) for name, value in wholes.items()}
        loss, norm = numbers["loss"], numbers["grad_norm"]
        self.check_finite(step, {"loss": loss, "grad_norm": norm})
        speed = (step - self.reported) * self.config.tokens_per_step / self.clock.lap()
        mfu = speed / self.peak_speed if self.peak_speed else None
        self.reported = step
        record = {"step": step, "tokens": self.tokens(step), "lr": lr, **numbers}
        record |= {"tokens_per_second": speed, "mfu": mfu, "seconds": self.clock.seconds()}
        each = (time.perf_counter() - self.began) / (step - self.first)
        left = tqdm.format_interval(each * (self.config.max_steps - step))
        share = f"mfu {mfu:.0%}" if mfu else f"norm {norm:.2f}"
        others = [f"{k} {v:.4g}  " for k, v in numbers.items() if k not in ("loss", "grad_norm")]
        pace = f"{tqdm.format_sizeof(speed):>5} tok/s  {left} left"
        self.metrics.log(record, f"loss {loss:.4f}  lr {lr:.1e}  {share}  {''.join(others)}{pace}")

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation; warn of a model that predicts worse than one without training."""
        loss, chance = loss_of(metrics), math.log(self.config.vocab_size)
        self.check_finite(step, {"validation loss": loss})
        record = {"step": step, "tokens": self.tokens(step)} | metrics
        self.metrics.log(record, evaluation_line(metrics))
        if loss > chance - 0.01:
            say(f"warning: no better than chance, {chance:.2f}: nothing is learned; lower the lr")
        if self.writes:
            prune(self.out_dir, self.config.keep_last)
        self.check_patience()

    def show_sample(self, step: int, model: LLaMaTransformer) -> None:
        """Print a new document, or a question and its answer, where sample_interval asks for it."""
        if self.config.sample_interval and step % self.config.sample_interval == 0:
            question, tokenizer = self.data.first_prompt(), self.data.tokenizer
            sampling = {"seed": self.config.seed, "max_new_tokens": 100}
            with generating(model):
                text = continue_text(model, tokenizer, question or "", **sampling)
            say(f"--- sample after step {step}\n{tokenizer.decode(question)}{text}\n---")

    def check_patience(self) -> None:
        """Note whether the newest evaluations, as many as patience says, have brought no best."""
        if not self.config.patience:
            return
        losses = list(from_first(lambda: val_losses(self.out_dir)).values())
        before, newest = losses[: -self.config.patience], losses[-self.config.patience :]
        self.out_of_patience = bool(before) and min(newest) >= min(before)

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """End the run where a value is not finite, before anything is overwritten."""
        if all(map(math.isfinite, values.values())):
            return
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        self.metrics.append({"step": step, "diverged": shown})
        self.metrics.close()
        raise UserError(
            f"not finite at step {step}: {shown}; lower lr={self.config.lr}; "
            f"last good checkpoint: {last_checkpoint(self.out_dir, before=step)}"
        )

    def check_weights(self, step: int, model: LLaMaTransformer) -> None:
        """End the run if a weight that this process keeps is not finite."""
        for name, parameter in model.named_parameters():
            if not to_local(parameter).isfinite().all():
                self.check_finite(step, {name: math.nan})

    def save(
        self, step: int, model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer]
    ) -> None:
        """Write step_NNNNNN, unless it is there; UserError, after cleaning up, if that fails.

        Processes that share the model out all call this, and hand their rows to the first.
        """
        final = self.out_dir / f"step_{step:06d}"
        if from_first(final.exists):
            return
        agree(lambda: self.check_weights(step, model))
        tensors = optimizer_tensors(model, optimizers)
        like = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in tensors.items()}
        state = {
            "step": step,
            "tokens": self.tokens(step),
            "seconds": self.clock.seconds(),
            "saved_at": time.time(),
            "data": self.data.sha256,
            "config": asdict(self.config),
            "base": self.base if self.writes else [],
        }
        scratch = self.out_dir / f".tmp-{final.name}"
        train_state = scratch / "train_state"
        try:
            if self.writes:
                scratch.mkdir(parents=True)  # anew, not what a link leads to
                train_state.mkdir()
                write_json(train_state / "state.json", state)
            save_model(model, scratch, files=self.files, writes=self.writes)
            if self.config.lora_rank:
                stored = stored_tensors(model, adapters=True)
                save_adapter(stored, self.config, scratch / "adapter", self.writes)
            path = train_state / "optimizer.safetensors"
            save_tensors(path, like, lambda name: to_full(tensors[name]), writes=self.writes)
            if self.writes:
                seal(scratch, final)
                prune(self.out_dir, self.config.keep_last)
        except OSError as error:  # the disk is full, for example
            raise UserError(
                f"{final} cannot be written ({error}); last checkpoint: "
                f"{last_checkpoint(self.out_dir)}; to go on: {resume_command(self.out_dir)}"
            ) from error
        finally:
            if self.writes:
                shutil.rmtree(scratch, ignore_errors=True)

    def save_snapshot(self, step: int, model: LLaMaTransformer) -> None:
        """Write snapshots/step_NNNNNN, the weights alone, if one is due and not there."""
        final = self.out_dir / "snapshots" / f"step_{step:06d}"
        if step not in self.snapshots or from_first(final.exists):
            return
        scratch = final.with_name(f".tmp-{final.name}")
        with warning(f"{final} cannot be written"):
            save_model(model, scratch, files=self.files, writes=self.writes)
            if self.writes:
                rename_into_place(scratch, final)
        if self.writes:
            shutil.rmtree(scratch, ignore_errors=True)

    def conclude(self, step: int) -> None:
        """Say how the run ended and what to do next."""
        self.bar.close()
        self.metrics.close()
        best = None
        with warning(f"{self.metrics.path} cannot be read"):
            best = best_checkpoint(self.out_dir)
        named = f"; best checkpoint: {best}" if best else ""
        if self.stopping:
            say(f"stopped after step {step}{named}\nto go on: {resume_command(self.out_dir)}")
            return
        ending = f"done in {tqdm.format_interval(self.clock.seconds())}"
        if self.out_of_patience:
            ending = f"ended after step {step}: patience={self.config.patience} is at its end"
        newest = best if self.out_of_patience else self.out_dir
        prompt = [] if self.data.conversations else ["--prompt=..."]  # a chat needs none
        say(f"{ending}{named}\nnext: {command('sample.py', f'--ckpt={newest}', *prompt)}")


def snapshot_steps(count: int, max_steps: int) -> set[int]:
    """Return about `count` steps from 0 to max_steps, evenly spread on a logarithmic scale."""
    if count < 1:
        return set()
    after = min(count - 1, max_steps)
    return {0, *np.geomspace(max_steps, 1, after).round().astype(int).tolist()}
