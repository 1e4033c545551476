"""plainllama/architecture.py: what is called a LLaMA is one, and what is not has a form of its own.

python tests/test_architecture.py      makes plainllama/toys.json with transformers
"""

import itertools
import json
import re
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from helpers import GPT2, LATENT, ROOT, every_shape, random_model, refusal, shape

import export
import sample
import visualize
from plainllama import architecture, machine
from plainllama.architecture import (
    TOLERANCE,
    TOYS,
    check_architecture,
    difference,
    label_of,
    toy_model,
    toy_of,
    variant,
)
from plainllama.families import OWN, find_family, write_config
from plainllama.huggingface import load_model, save_model, side_files
from plainllama.tensors import stored_tensors
from plainllama.tokenizer import find_tokenizer

SWITCHES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
FEATURES = {
    "tie_embeddings": (True, False),
    "n_kv_heads": (0, 2),
    "head_dim": (0, 20),
    "rope_factor": (0.0, 8.0),
}
LATENT_FEATURES = FEATURES | {"n_kv_heads": (0,), "head_dim": (0,), "q_lora_rank": (0, 24)}
FAMILY_TOYS = [  # all that toys.json holds
    *((switches, FEATURES) for switches in SWITCHES.values()),
    (LATENT, LATENT_FEATURES),
    (GPT2, {"tie_embeddings": (True, False)}),
]


def every_toy() -> dict:
    """The toy of every variant, by name, and its family."""
    toys = {}
    for switches, features in FAMILY_TOYS:
        for values in itertools.product(*features.values()):
            config = shape(**switches | dict(zip(features, values, strict=True)))
            family, toy = find_family(config)[0], toy_of(config)
            toys[variant(family, toy)] = family, toy
    return toys


def transformers_numbers(family: str, toy, folder: Path) -> list[float]:
    """The logits that toys.json holds of a toy, computed by transformers in float64."""
    import transformers

    write_config(toy, folder, {}, family)
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    tensors = stored_tensors(toy_model(toy, torch.float64), family)
    state = {name: stored.read() for name, stored in tensors.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if toy.tie_embeddings else set())
    theirs.tie_weights()
    ends = torch.tensor(architecture.PARTS).cumsum(0) - 1
    with torch.no_grad():
        logits = theirs(architecture.toy_tokens(toy)).logits[0, ends]
    return logits[:, ::11].flatten().tolist()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_toys_json_holds_what_transformers_computes(every, tmp_path):
    held, toys = json.loads(TOYS.read_text(encoding="utf-8")), every_toy()
    assert held.keys() == toys.keys() | {"sizes"}
    for name, toy in list(toys.items())[::every]:
        assert difference(transformers_numbers(*toy, tmp_path), held[name]) < TOLERANCE / 10


@every_shape
def test_each_family_is_called_what_it_is_by_any_rounding(changes, monkeypatch):
    """In float32 as well, whose rounding is more than any two processors differ by in float64."""
    config = shape(**changes)
    name, toy = find_family(config)[0], toy_of(config)
    assert label_of(config) == (name, "")
    expected = json.loads(TOYS.read_text(encoding="utf-8"))[variant(name, toy)]
    rounded = architecture.run_toy(toy_model(toy, torch.float32))
    assert difference(rounded, expected * 2) < TOLERANCE / 5


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"norm": "layernorm"}, "no family has norm=layernorm"),
        ({"v_head_dim": 7}, "no llama has v_head_dim=7"),
        (LATENT | {"n_kv_heads": 2}, "no deepseek_v3 has n_kv_heads=2"),
        (GPT2 | {"head_dim": 8}, "no gpt2 has head_dim=8"),
        (GPT2 | {"rope_theta": 5e5}, "no gpt2 has rope_theta=500000.0"),
        (GPT2 | {"bias": False}, "no family has position=learned, norm=layernorm, mlp=gelu"),
    ],
    ids=str,
)
def test_a_setting_that_the_family_does_not_know_is_named(changes, why):
    assert label_of(shape(**changes)) == (OWN, why)


STRETCHED = {"rope_factor": 8.0}
QUERIES = LATENT | {"q_lora_rank": 24}
MUTATIONS = [  # a token or two of model.py, what takes its place, and the family that is no more
    ("F.silu(", "F.relu(", {}),
    ("F.silu(self.gate(x)) *", "F.silu(self.gate(x)) +", {}),
    ("x32.pow(2)", "x32.abs()", {}),
    ("keepdim=True) + self.eps", "keepdim=True) + 1e-5", {}),
    ("return self.weight * x32", "return self.weight + x32", {}),
    ("1.0 / theta**", "2.0 / theta**", {}),
    ("first * cos - second", "first * cos + second", {}),
    ("second * cos + first", "second * cos - first", {}),
    ("is_causal=causal", "is_causal=False", {}),
    ("return x + ", "return x - ", {}),
    ("self.ffwd(self.norm2(x))", "self.ffwd(self.norm1(x))", {}),
    ("self.attention(self.norm1(x)", "self.attention((x)", {}),
    ("x.type_as(attended) + attended", "x.type_as(attended) - attended", {}),
    ("self.final_linear(self.norm(h))", "self.final_linear((h))", {}),
    ("h = self.embeddings(tokens)", "h = 2 * self.embeddings(tokens)", {}),
    ("self.wk(x).unflatten", "self.wv(x).unflatten", {}),
    ("apply_rope(k, cos, sin)", "k", {}),
    ("c.rope_width, c.rope_theta", "c.rope_width, 10000.0", {}),
    ("kind(config.n_embd, config.norm_eps)", "kind(config.n_embd, 1e-5)", {}),
    ("torch.arange(start, end", "torch.arange(0, end - start", {}),
    ("(keys <= queries)", "(keys >= queries)", {}),
    ("k.size(1), -1", "k.size(1), 1", {"n_kv_heads": 2}),
    ("= self.q_norm(q), self", "= q, self", {"qk_norm": True}),
    ("config.bias or config.qkv", "config.bias and config.qkv", {"qkv_bias": True}),
    ('approximate="tanh"', 'approximate="none"', GPT2),
    ("h = h + self.positions", "h = h - self.positions", GPT2),
    ("nn.LayerNorm if", "RMSNorm if", GPT2),
    (".clamp(0, 1)", ".clamp(0, 2)", STRETCHED),
    ("(1 - kept) / factor", "(1 - kept) * factor", STRETCHED),
    ("eps = 1e-6", "eps = 1e-5", QUERIES),
    ("self.kv_norm(latent), apply", "latent, apply", LATENT),
    ("head_width**-0.5", "head_width**-0.4", LATENT),
    ("q @ up_k, q_rotated", "q @ up_v[..., :10, :], q_rotated", LATENT),
    ("self.norm2 = make_norm", "self.norm3 = make_norm", {}),
]
HARMLESS = [
    ("return x + ", "return 1 * x + ", {}),
    ("first * cos - second * sin", "cos * first - sin * second", {}),
    ("1.0 / theta**exponents", "theta**-exponents", {}),
    ("(keys <= queries)", "(keys < queries)", {}),  # beside (keys == queries)
    ("x32.pow(2)", "x32.square()", {}),
    ("F.silu(self.gate(x))", "self.gate(x) * self.gate(x).sigmoid()", {}),
    ("to_stream = name.endswith", "to_stream = 1 * name.endswith", GPT2),
]


@pytest.fixture
def changed(monkeypatch):
    """The label of a shape after a change of model.py's text."""
    source = (ROOT / "model.py").read_text(encoding="utf-8")

    def change(before: str, after: str, config):
        assert before in source, f"model.py no longer has {before}"
        module = types.ModuleType("changed_model")
        monkeypatch.setitem(sys.modules, "changed_model", module)
        exec(compile(source.replace(before, after), "changed_model.py", "exec"), module.__dict__)
        monkeypatch.setattr(machine, "LLaMaTransformer", module.LLaMaTransformer)
        monkeypatch.setattr(architecture, "KVCache", module.KVCache)
        architecture.toy_numbers.cache_clear()
        return label_of(config)

    yield change
    architecture.toy_numbers.cache_clear()


@pytest.mark.parametrize("before, after, changes", MUTATIONS, ids=str)
def test_a_change_of_what_model_py_computes_is_caught(changed, before, after, changes):
    family, why = changed(before, after, shape(**changes))
    assert family == OWN
    apart = re.search(r"logits differ by (\S+)\)", why)
    assert apart is None or float(apart[1]) > 5 * TOLERANCE  # not by chance


@pytest.mark.parametrize("before, after, changes", HARMLESS, ids=str)
def test_a_change_of_how_model_py_computes_it_is_not(changed, before, after, changes):
    assert changed(before, after, shape(**changes))[0] == find_family(shape(**changes))[0]


def test_before_training_it_is_said_once_that_checkpoints_will_be_ones_own(changed, capsys):
    changed("F.silu(", "F.relu(", shape())
    check_architecture(shape())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("model.py no longer computes a llama (logits differ by ")
    assert line.endswith("): checkpoints are plainllama's own")
    check_architecture(shape(norm="layernorm"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "no family has norm=layernorm: checkpoints are plainllama's own"


def test_a_new_parameter_is_named_before_training(changed):
    norm = "self.norm2 = make_norm(config)"
    label = changed(norm, f"{norm}\n        self.norm3 = make_norm(config)", shape())
    assert label == (
        OWN,
        "model.py no longer computes a llama: it has decoder_blocks.*.norm3.weight",
    )


def test_what_a_cache_does_not_compute_is_warned_of(changed, capsys):
    changed("self.gate(x)) *", "self.gate(x)).cumsum(1) *", shape())
    check_architecture(shape())
    assert "warning: sample.py will not compute what is trained: logits" in capsys.readouterr().out
    assert "a small one fails: name 'gte'" in changed("self.gate(x)) *", "gte) *", shape())[1]
    check_architecture(shape())
    assert "warning: sample.py will not compute what is trained: a small" in capsys.readouterr().out


def test_buffers_that_no_checkpoint_keeps_are_refused_before_training(changed):
    norm = "self.norm2 = make_norm(config)"
    buffer = "self.register_buffer('ramp', torch.arange(48.0))"
    changed(norm, f"{norm}\n        {buffer}", shape(norm="layernorm"))
    with refusal("buffers decoder_blocks.*.ramp", "init_rope()"):
        check_architecture(shape(norm="layernorm"))


@pytest.mark.parametrize(
    "line", ["import train", "from plainllama.muon import Muon", "from . import train"]
)
def test_a_model_py_that_could_not_be_copied_is_refused_before_training(
    line, tmp_path, monkeypatch
):
    for name in ("train.py", "plainllama"):
        (tmp_path / name).touch()
    (tmp_path / "model.py").write_text(f"import torch.nn\n{line}\n")
    beside = types.SimpleNamespace(__file__=str(tmp_path / "model.py"))
    monkeypatch.setattr(architecture, "own_model", beside)
    check_architecture(shape())  # of a family, whose checkpoints have no copy
    with refusal("model.py imports ", "installed packages alone"):
        check_architecture(shape(norm="layernorm"))


def test_a_checkpoint_of_a_family_that_model_py_no_longer_computes_is_refused(
    changed, tmp_path, capsys
):
    model = random_model()
    save_model(model, tmp_path)
    changed("F.silu(", "F.relu(", shape())
    with refusal(f"{tmp_path} is a llama, but model.py no longer computes a llama", "--init_from"):
        load_model(tmp_path)
    trained_on = load_model(tmp_path, shape=model.config)
    assert f"warning: {tmp_path} is a llama, but" in capsys.readouterr().out
    assert trained_on.norm.weight.equal(model.norm.weight)


def run_stages(directory: Path):
    """Calls of the stages that read a checkpoint."""
    yield lambda: sample.run(sample.SampleConfig(ckpt=str(directory), prompt="a", device="cpu"))
    yield lambda: export.run(export.ExportConfig(ckpt=str(directory)))
    yield lambda: visualize.run(visualize.VisualizeConfig(ckpt=str(directory)))


def test_the_stages_that_read_a_checkpoint_refuse_what_they_cannot_compute(changed, tmp_path):
    tokenizer = find_tokenizer("byte")
    for name, changes in (("llama", {}), ("own", {"norm": "layernorm"})):
        model = random_model(**changes)
        save_model(model, tmp_path / name, files=side_files(model.config, tokenizer))
    _, exports, shows = run_stages(tmp_path / "own")
    with refusal("own is an architecture of its own (no family has norm=layernorm): llama.cpp"):
        exports()
    with refusal("own is an architecture of its own (no family has norm=layernorm): the page"):
        shows()
    changed("F.silu(", "F.relu(", shape())
    for reads in run_stages(tmp_path / "llama"):
        with refusal("llama is a llama, but model.py no longer computes a llama", "--init_from"):
            reads()
    for reads in run_stages(tmp_path / "own"):
        with refusal("own "):
            reads()
    assert not list(tmp_path.glob("*/*.gguf*")) + list(tmp_path.glob("*/page.html"))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = {n: transformers_numbers(*toy, Path(folder)) for n, toy in every_toy().items()}
    rows = {"sizes": json.loads(TOYS.read_text(encoding="utf-8"))["sizes"]}
    rows |= {name: [round(x, 5) for x in numbers] for name, numbers in made.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    TOYS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
