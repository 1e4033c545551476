"""Simulate sharded training on many processes: what one keeps, and what it sends in a step.

The real sharding code runs, as one process of N, with tensors that have shapes but no memory
(FakeTensorMode) and a process group that sends nothing; every collective is counted.

    python tools/scale.py          # the tables of docs/SCALE.md
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import LLaMaTransformer, ModelConfig  # noqa: E402
from plainllama.machine import n_params  # noqa: E402
from plainllama.shard import local, make_mesh, shard_model  # noqa: E402

LLAMA = {"vocab_size": 128_256, "n_kv_heads": 8, "tie_embeddings": False}
MODELS = {
    "1B": {"vocab_size": 50_257, "n_layers": 22, "n_embd": 2048, "n_heads": 16, "n_kv_heads": 4}
    | {"multiple_of": 256},
    "8B": LLAMA | {"n_layers": 32, "n_embd": 4096, "n_heads": 32, "hidden_dim": 14_336},
    "70B": LLAMA | {"n_layers": 80, "n_embd": 8192, "n_heads": 64, "hidden_dim": 28_672},
}


class Count(TorchDispatchMode):
    """Adds up the bytes that one process sends, by collective and number of processes.

    Each takes rings, in which one of n sends (n - 1) / n of what is gathered or scattered, and
    twice that of what is reduced for all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[tuple[str, int], float] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::")
        kinds = {"_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1), "allreduce_": (0, 2)}
        if name in kinds:
            place, times = kinds[name]
            tensors = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
            names = [argument.name for argument in function._schema.arguments]
            n = dist.ProcessGroup.unbox(args[names.index("process_group")]).size()
            sent = times * (n - 1) / n * sum(t.numel() * t.element_size() for t in tensors)
            kind = name.strip("_").removesuffix("_base"), n
            self.bytes[kind] = self.bytes.get(kind, 0.0) + sent
        return function(*args, **(kwargs or {}))


def simulate(shape: dict, processes: int, per_node: int = 8, shard: str = "all") -> dict:
    """Return parameters, the bytes of them that a process keeps, and what a micro-step sends."""
    os.environ |= {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{per_node}", "RANK": "0"}
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with torch.device("meta"):
            model = LLaMaTransformer(ModelConfig(**shape, max_seq_len=16))
        count = n_params(model)
        shard_model(model, make_mesh(shard, "cpu"), torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            if model.config.tie_embeddings:
                model.final_linear.weight = model.embeddings.weight
            model.init_rope()
            tokens = torch.zeros(1, 16, dtype=torch.long)
            kept = sum(local(p).nbytes for p in model.parameters())
            with Count() as counted, torch.autocast("cpu", torch.bfloat16):
                model(tokens, tokens, reduction="sum")[1].backward()
    finally:
        dist.destroy_process_group()
    return {"parameters": count, "kept": kept, "sent": counted.bytes}


GB = 1e9
NVLINK = 450 * GB  # bytes a second, one direction, of an H100 in a DGX (NVIDIA's data sheet)
NETWORK = 50 * GB  # a 400 Gb/s card for each of the eight GPUs of a node
FLOPS = 0.4 * 989e12  # dense bf16 a second at 40% of an H100's peak
TOKENS = 8 * 2048  # a micro-step's, on each GPU
DISK = 2 * GB  # bytes a second that one process writes and reads back for its checksum


def expected(shape: dict, processes: int, shard: str) -> dict[str, float]:
    """Return what the arithmetic of docs/SCALE.md says: GB, and seconds of a micro-step."""
    c = ModelConfig(**shape)
    with torch.device("meta"):
        model = LLaMaTransformer(c)
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.decoder_blocks.parameters())
    rest = total - blocks
    n = min(8, processes) if shard == "node" else processes
    kept = 16 * total / n
    # One block and the next one that is fetched ahead, bf16; the group of the rest, fp32; and their
    # gradients, whole, until they are added up.
    largest = blocks / c.n_layers
    gathered = 2 * 2 * largest + 4 * rest + 4 * largest + 4 * rest
    inputs = 4 * TOKENS * c.n_embd * c.n_layers  # fp32, with activation_checkpointing
    logits = 2 * TOKENS * c.vocab_size * 4
    sent = (2 * 2 * blocks + 4 * rest + 4 * total) * (n - 1) / n
    copies = processes // n
    across = 2 * 4 * total / n * (copies - 1) / copies  # once a step, not a micro-step
    link = NVLINK if n <= 8 else NETWORK
    compute = 8 * (total - rest / 2) * TOKENS / FLOPS  # 6, and 2 for what is computed again
    talk = sent / link + across / NETWORK
    return {
        "parameters": total / GB,
        "kept": kept / GB,
        "gathered": gathered / GB,
        "activations": (inputs + logits) / GB,
        "sent": (sent + across) / GB,
        "compute": compute,
        "communication": talk,
        "share": talk / (talk + compute),
        "checkpoint": 12 * total / DISK,
    }


def table() -> str:
    """Return the table of docs/SCALE.md."""
    head = (
        "| model | GPUs | shard | kept | gathered | activations | sent | talk | compute | share |"
    )
    lines = [f"{head} checkpoint |", "|---|---|---|" + "---:|" * 8]
    for name, shape in MODELS.items():
        for processes in (8, 64, 1024):
            for shard in ("all", "node") if processes > 8 else ("all",):
                e = expected(shape, processes, shard)
                sizes = " | ".join(
                    f"{e[key]:,.1f} GB" for key in ("kept", "gathered", "activations", "sent")
                )
                times = f"{e['communication']:.2f} s | {e['compute']:.2f} s | {e['share']:.0%}"
                saving = f"{e['checkpoint']:,.0f} s"
                lines.append(f"| {name} | {processes:,} | {shard} | {sizes} | {times} | {saving} |")
    return "\n".join(lines)


def simulated() -> str:
    """Return the table of what the sharding code itself keeps and sends."""
    lines = [
        "| model | GPUs | shard | weights kept | sent in a micro-step |",
        "|---|---|---|---:|---|",
    ]
    for name, shape in MODELS.items():
        for processes in (8, 64, 1024):
            for shard in ("all", "node") if processes > 8 else ("all",):
                found = simulate(shape, processes, shard=shard)
                sent = ", ".join(
                    f"{kind} of {n}: {size / GB:.2f} GB"
                    for (kind, n), size in found["sent"].items()
                )
                kept = found["kept"] / GB
                lines.append(f"| {name} | {processes:,} | {shard} | {kept:.2f} GB | {sent} |")
    return "\n".join(lines)


def main() -> None:
    print(table())
    print()
    print(simulated())


if __name__ == "__main__":
    main()
