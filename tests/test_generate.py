"""plainllama/generate.py: what is generated, with and without cache and padding."""

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
)

from plainllama.generate import CompiledRead, generate


@every_family
def test_static_decoding_equals_the_full_forward_with_and_without_padding(changes):
    torch._dynamo.reset()
    model = random_model(**changes)
    prompts = [random_tokens(1, length)[0] for length in (5, 9)]
    for rows in ([prompts[0]], prompts):
        eager = generated(model, rows, 40)
        compiled = torch.compile(
            lambda *given: model.unembed(model.read(*given)),
            fullgraph=True,
            backend="eager",
            dynamic=False,
        )
        read = CompiledRead(compiled, 32)
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


def test_a_text_longer_than_the_compiled_cache_gets_one_of_the_whole_context():
    model, sizes = random_model(), []
    expected = generated(model, [[1, 2, 3]], 20)

    def call(tokens, positions, cache):
        sizes.append(cache.size)
        return model.unembed(model.read(tokens, positions, cache))

    for count, columns in ((13, 16), (14, 32), (40, 32)):
        generated(model, [[1, 2, 3]], count, CompiledRead(call, 16))
        assert sizes[-1] == columns
    found = generated(model, [[1, 2, 3]], 20, CompiledRead(call, 16))
    for (logits, token), (exact, exact_token) in zip(found, expected, strict=True):
        close(logits, exact)
        assert token.tolist() == exact_token.tolist()


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
