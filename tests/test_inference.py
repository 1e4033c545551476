"""plainllama/inference.py: every form that is faster gives what the plain one does."""

import pytest
import torch
from helpers import (
    FAMILY_NAMES,
    SHAPES,
    close,
    every_family,
    generated,
    random_model,
    random_tokens,
    rounding,
)

from plainllama import inference
from plainllama.inference import compile_decoding, prepare_decoding


def stored_bytes(model: torch.nn.Module) -> int:
    """The memory of a model's weights, each counted once."""
    stored = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())


@pytest.mark.parametrize(
    "name, how",
    [
        *((name, "float32") for name in FAMILY_NAMES),
        ("grouped-query", "bfloat16"),
        *((name, "int8") for name in ("grouped-query", "GPT-2")),
    ],
)
def test_what_is_compiled_for_single_rows_gives_the_plain_layers_logits(name, how, monkeypatch):
    changes = SHAPES[name]

    def build():
        model = random_model(n_layers=1, **changes).to(
            torch.bfloat16 if how == "bfloat16" else torch.float32
        )
        if how == "int8":
            inference.quantize_int8(model)
        return model

    plain, compile = build(), torch.compile
    expected = [logits.float() for logits, _ in generated(plain, [[3, 1, 4, 1, 5]], 12)]
    graphs = []  # the code that is compiled, in place of a compiler's of minutes

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {"fullgraph": True, "dynamic": False, "backend": backend}
    monkeypatch.setattr(torch, "compile", lambda read, **_: compile(read, **options))
    torch._dynamo.reset()
    model = build()
    before = stored_bytes(model)
    decoder = prepare_decoding(model, 1, compiled=True)
    assert stored_bytes(model) == before  # what is read by rows is no copy
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [logits.float() for logits, _ in generated(model, [[3, 1, 4, 1, 5]], 12, decoder)]
    # bfloat16, the input of 8 bits' products of many rows, rounds by 2^16 as much as float32.
    for logits, exact in zip(found[:2], expected[:2], strict=True):  # texts may part later
        close(logits, exact, rounding(exact) * (1 if how == "float32" else 2**16))
    if how == "float32":
        close(found, expected)
    code = "".join(graph.code for graph in graphs)
    assert ".sum(-1)" in code and "torch._C._nn.linear" not in code
    shared = model.config.use_mla or model.config.kv_heads < model.config.n_heads
    assert ("scaled_dot_product_attention" in code) == shared


@pytest.mark.parametrize("longest, columns", [(0, 1000), (128, 128), (129, 256), (4000, 1000)])
def test_the_compiled_cache_holds_the_text_and_no_more_than_twice_as_much(
    longest, columns, monkeypatch
):
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda read, **_: compile(read, backend="eager"))
    model = random_model(max_seq_len=1000, n_layers=1)
    assert prepare_decoding(model, 1, compiled=True, longest=longest).columns == columns


@pytest.mark.parametrize("width", [8, 16, 17, 48, 100])
def test_a_layer_of_8_bits_takes_inputs_of_any_width(width):
    layer = torch.nn.Linear(width, 24)
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, found = layer(rows), inference.Int8Linear(layer)(rows)
    assert (found - exact).norm() < 0.05 * exact.norm()


@every_family
def test_weights_by_columns_give_the_same_text(changes, monkeypatch):
    expected = generated(random_model(**changes), [[3, 1, 4, 1, 5]], 40)
    model = random_model(**changes)
    with torch.no_grad():
        whole = model(random_tokens())[0]
    monkeypatch.setattr(inference, "best_time", lambda row, weight: 1.0)
    assert prepare_decoding(model, 1, compiled=False) is None
    assert model.decoder_blocks[0].ffwd.up.weight.stride() == (1, model.config.hidden_width)
    for (logits, token), (exact, exact_token) in zip(
        generated(model, [[3, 1, 4, 1, 5]], 40), expected, strict=True
    ):
        close(logits, exact)
        assert token.tolist() == exact_token.tolist()
    close(model(random_tokens())[0], whole)


def test_weights_stay_by_rows_where_columns_are_slower(monkeypatch):
    monkeypatch.setattr(
        inference, "best_time", lambda row, weight: 1.0 if weight.is_contiguous() else 1.3
    )
    model = random_model()
    prepare_decoding(model, 1, compiled=False)
    assert all(weight.is_contiguous() for weight in model.parameters())


@pytest.mark.slow
def test_without_a_working_compiler_decoding_goes_on_eagerly_after_one_warning(capfd):
    model = random_model(n_layers=1)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        torch._dynamo.reset()
        assert compile_decoding(model, 1) is None
    assert capfd.readouterr().err.count("warning: decoding without torch.compile") == 1
