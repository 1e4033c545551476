"""plainllama/machine.py: what is faster on some processors changes no result, and is found."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, random_tokens
from several import launch

from model import ModelConfig
from plainllama.machine import (
    compile_for_training,
    group_limits,
    multiply_by_onednn,
    set_up_machine,
    training_seconds,
)
from train import TrainConfig


def machine_of(width: int, context: int = 256):
    """The machine of a run on a CPU in float32."""
    shape = {"n_embd": width, "n_heads": 1, "max_seq_len": context, "tokens_per_step": 64 * context}
    return set_up_machine(TrainConfig(device="cpu", dtype="float32", compile=False, **shape))


GROUPS = {  # what /proc/self/cgroup says, and the limits that lie under /sys/fs/cgroup -> the least
    "v2, its own": ("0::/a/b", {"a/b/memory.max": "1000"}, 1000),
    "v2, of its parent": ("0::/a/b", {"a/memory.max": "900", "a/b/memory.max": "max"}, 900),
    "v2, seen from inside": ("0::/../x", {"memory.max": "800"}, 800),
    "v1": (
        "5:cpu,memory:/docker/1\n0::/",
        {
            "memory/memory.limit_in_bytes": "700",
            "memory/docker/1/memory.limit_in_bytes": "9000",
        },
        700,
    ),
    "no limit": ("0::/a", {"a/memory.max": "max"}, None),
    "no groups": ("", {}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_memory_of_a_container_is_the_least_of_all_around_it(name, tmp_path):
    lines, limits, expected = GROUPS[name]
    (tmp_path / "cgroup").write_text(lines)
    for file, limit in limits.items():
        place = tmp_path / "fs" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{limit}\n")
    found = list(group_limits(tmp_path / "fs", tmp_path / "cgroup"))
    assert min(found, default=None) == expected


def test_a_real_group_of_the_kernel_is_seen():
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = any("memory" in controllers.split(",") for _, controllers, _ in own)
    group = Path("/sys/fs/cgroup", "memory" if first else "", f"plainllama-{os.getpid()}")
    limit = "memory.limit_in_bytes" if first else "memory.max"
    script = """
import os
from pathlib import Path
from plainllama.machine import device_memory
Path(os.environ["GROUP"], "cgroup.procs").write_text(str(os.getpid()))
print(device_memory("cpu"))
"""
    try:
        group.mkdir()
        (group / limit).write_text("2000000000")
    except OSError as error:
        pytest.skip(f"this user may not make a control group: {error}")
    try:
        printed = launch(1, [], script=script, GROUP=str(group))
    finally:
        group.rmdir()
    assert int(printed) == 2_000_000_000 // 4096 * 4096


@pytest.fixture
def mode():
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield lambda: torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("changed", "faster"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False, "amx_tile": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True, "amx_tile": False}, False),
        ({}, False),
    ],
)
def test_onednn_multiplies_on_amd_with_avx512_and_nothing_is_rounded(
    changed, faster, mode, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: changed)
    assert multiply_by_onednn(allowed=True) == faster
    assert mode() == ("bf16" if faster else "none")
    assert not multiply_by_onednn(allowed=False) and mode() == "none"


@pytest.mark.parametrize(
    ("width", "context", "faster"), [(128, 512, True), (130, 512, False), (128, 513, False)]
)
def test_onednn_is_for_small_models_whose_attention_can_keep_its_scores(
    width, context, faster, mode, monkeypatch
):
    has = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    machine = machine_of(width, context)
    assert machine.onednn == faster
    scores = torch.ones(1, 1, 2, 2, requires_grad=True)
    with machine.attention():
        y = torch.nn.functional.scaled_dot_product_attention(scores, scores, scores)
    assert ("Flash" in y.grad_fn.name()) != faster


@pytest.mark.slow
@pytest.mark.parametrize("onednn", [True, False])
def test_the_attention_that_onednn_is_fast_at_stays_when_it_is_compiled(onednn, mode):
    torch.compiler.reset()
    machine = replace(machine_of(32), onednn=onednn)
    model = random_model(n_layers=1)
    tokens = random_tokens()
    with machine.attention():
        compile_for_training(model, len(tokens), machine)
        with torch.profiler.profile() as profile:
            model(tokens, tokens.clone(), reduction="sum")
    called = " ".join(event.key for event in profile.key_averages())
    assert "Compiled" in called and ("flash_attention" in called) != onednn


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="AMX would round to bfloat16")
@pytest.mark.parametrize("shape", [(1, 128, 128), (768, 4096, 128), (2048, 96, 256), (7, 33, 65)])
def test_products_allowed_to_round_are_float32_without_amx(shape, mode):
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    rows, out, width = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=random, requires_grad=True)
    weight = torch.randn(out, width, generator=random, requires_grad=True)
    gradient = torch.randn(rows, out, generator=random)
    found = torch.nn.functional.linear(x, weight)
    found.backward(gradient)
    exact = [x.double() @ weight.double().t()]
    exact += [gradient.double() @ weight.double(), gradient.double().t() @ x.double()]
    for y, reference in zip((found, x.grad, weight.grad), exact, strict=True):
        # A product of n terms errs by sqrt(n) roundings, of 2^-24; bfloat16's are of 2^-9.
        assert (y - reference).norm() < 4096**0.5 * 2**-24 * reference.norm()


def test_the_time_of_training_follows_from_the_speed_of_a_product(monkeypatch):
    shape = ModelConfig(vocab_size=320, n_layers=3, n_embd=32, n_heads=2, max_seq_len=16)
    monkeypatch.setattr("plainllama.machine.find_device", lambda name: torch.device("cpu"))
    measured = SimpleNamespace(median=2 * 1024**3 / 1e11)  # seconds, of 100 GFLOPs each
    timer = SimpleNamespace(blocked_autorange=lambda min_run_time: measured)
    monkeypatch.setattr("torch.utils.benchmark.Timer", lambda *given, **more: timer)
    hidden = shape.hidden_width
    weights = 3 * (4 * 32 * 32 + 3 * 32 * hidden) + 320 * 32
    flops = 6 * weights + 12 * 3 * 32 * 16
    assert training_seconds(shape, 1e9) == pytest.approx(1e9 * flops / 0.2e11)
