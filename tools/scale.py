"""Simulate sharded training on many processes: what one keeps, and what it sends in a step.

The real sharding code runs, as one process of N, with tensors that have shapes but no memory
(FakeTensorMode) and a process group that sends nothing; every collective is counted.

    python tools/scale.py          # the table of docs/SCALE.md
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


def main() -> None:
    for name, shape in MODELS.items():
        for processes in (8, 64, 1024):
            for shard in ("all", "node"):
                found = simulate(shape, processes, shard=shard)
                sent = " ".join(
                    f"{kind} of {n}: {size / 1e9:.2f} GB"
                    for (kind, n), size in found["sent"].items()
                )
                kept = 4 * found["kept"] / 1e9
                print(f"{name:>3} {processes:5} {shard:4} keeps {kept:7.2f} GB; sends {sent}")


if __name__ == "__main__":
    main()
