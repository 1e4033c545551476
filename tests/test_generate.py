"""plainllama/generate.py: what is generated, with and without cache, padding and compiled code."""

import pytest
import torch
from helpers import (
    FAMILY_NAMES,
    SHAPES,
    close,
    every_family,
    generated,
    greedy,
    random_model,
    random_tokens,
    rounding,
)

from plainllama import generate as engine
from plainllama.generate import compile_decoding, generate, prepare_decoding


@every_family
def test_static_decoding_equals_the_full_forward_with_and_without_padding(changes):
    torch._dynamo.reset()
    model = random_model(**changes)
    prompts = [random_tokens(1, length)[0] for length in (5, 9)]
    for rows in ([prompts[0]], prompts):
        eager = generated(model, rows, 40)
        read = torch.compile(
            lambda *given: model.unembed(model.read(*given)),
            fullgraph=True,
            backend="eager",
            dynamic=False,
        )
        with torch._dynamo.config.patch(error_on_recompile=len(rows) == 1):
            static = generated(model, rows, 40, read)  # through the end of the context
        for (logits, token), (expected, expected_token) in zip(static, eager, strict=True):
            close(logits, expected)
            assert token.tolist() == expected_token.tolist()


@every_family
def test_one_prefill_serves_all_samples_of_a_prompt(changes):
    model = random_model(**changes)
    prompts = [random_tokens(1, length)[0] for length in (5, 9)]
    lengths = []
    model.embeddings.register_forward_hook(lambda *call: lengths.append(call[2].shape[:2]))
    shared = torch.stack(list(generate(model, prompts, 40, greedy, num_samples=3)), dim=1)
    assert lengths[:2] == [(2, 9), (6, 1)]
    alone = torch.stack(list(generate(model, prompts, 40, greedy)), dim=1)
    assert shared.tolist() == alone.repeat_interleave(3, dim=0).tolist()


def test_the_cache_is_no_longer_than_the_text_can_become():
    model, sizes = random_model(), []
    model.decoder_blocks[0].register_forward_pre_hook(
        lambda block, inputs: sizes.append(inputs[1].cache.size)
    )
    list(generate(model, [[1, 2, 3]], 4, greedy))
    list(generate(model, [[1, 2, 3]], 40, greedy))
    assert sizes[0] == 7 and sizes[-1] == 32


LENGTHS = [[1, 1], [5], [20, 20], [3, 7, 1, 20, 6]]


@pytest.mark.parametrize(
    "S, lengths, changes",
    [(S, lengths, {"n_kv_heads": 2}) for S in (1, 7, 8) for lengths in LENGTHS]
    + [(8, LENGTHS[-1], SHAPES[name]) for name in FAMILY_NAMES],
    ids=str,
)
def test_generation_past_the_context_rereads_the_newer_half_of_each_prompt(S, lengths, changes):
    model = random_model(max_seq_len=S, **changes)
    prompts = [random_tokens(1, length)[0] for length in lengths]
    steps = generated(model, prompts, 3 * S + 2)
    for row, context in enumerate(prompt[-S:] for prompt in prompts):
        for logits, token in steps:
            close(logits[row], model(context[None])[0][0, -1].detach())
            context = torch.cat((context, token[row, None]))
            if len(context) > S:
                context = context[-max(1, S // 2) :]


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_compiled_for_single_rows_gives_the_plain_layers_logits(
    changes, dtype, monkeypatch
):
    plain, compile = random_model(**changes).to(dtype), torch.compile
    expected = [logits.float() for logits, _ in generated(plain, [[3, 1, 4, 1, 5]], 12)]
    graphs = []  # the code that is compiled, in place of a compiler's of minutes

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {"fullgraph": True, "dynamic": False, "backend": backend}
    monkeypatch.setattr(torch, "compile", lambda read, **_: compile(read, **options))
    torch._dynamo.reset()
    model = random_model(**changes).to(dtype)
    read = prepare_decoding(model, 1, compiled=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [logits.float() for logits, _ in generated(model, [[3, 1, 4, 1, 5]], 12, read)]
    # bfloat16 rounds by 2^16 as much as float32.
    for logits, exact in zip(found[:2], expected[:2], strict=True):  # texts may part later
        close(logits, exact, rounding(exact) * (1 if dtype == torch.float32 else 2**16))
    if dtype == torch.float32:
        close(found, expected)
    code = "".join(graph.code for graph in graphs)
    assert ".sum(-1)" in code and "torch._C._nn.linear" not in code


def test_a_large_matrix_is_summed_in_parts(monkeypatch):
    layer, row = torch.nn.Linear(24, 5001, dtype=torch.float64), torch.randn(1, 1, 24).double()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = engine.RowLinear(layer)(row.float())
    close(found.double(), layer(row.float().double()))


@every_family
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_joined_layers_give_the_plain_ones_products(changes, int8, monkeypatch):
    model = random_model(**changes)
    if int8:
        engine.quantize_int8(model)
    with torch.no_grad():
        tokens = random_tokens()
        before = model(tokens)[0]
        engine.join_layers(model)
        close(model(tokens)[0], before, atol=0)  # each layer by itself, of its rows
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        close(model(tokens)[0], before)
    parts = [module for module in model.modules() if isinstance(module, engine.Part)]
    assert len(parts) >= 2 * len(model.decoder_blocks)
    for part in parts:
        whole = part.joined.weight.untyped_storage().data_ptr()
        assert part.layer.weight.untyped_storage().data_ptr() == whole


@every_family
def test_weights_by_columns_give_the_same_text(changes, monkeypatch):
    expected = generated(random_model(**changes), [[3, 1, 4, 1, 5]], 40)
    model = random_model(**changes)
    with torch.no_grad():
        whole = model(random_tokens())[0]
    monkeypatch.setattr(engine, "seconds_of_product", lambda row, weight: 1.0)
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
        engine, "seconds_of_product", lambda row, weight: 1.0 if weight.is_contiguous() else 1.3
    )
    model = random_model()
    prepare_decoding(model, 1, compiled=False)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_without_a_working_compiler_decoding_goes_on_eagerly_after_one_warning(capfd):
    model = random_model()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        torch._dynamo.reset()
        assert compile_decoding(model, 1) is None
    assert capfd.readouterr().err.count("warning: decoding without torch.compile") == 1
