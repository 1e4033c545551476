"""plainllama/generation.py: what is generated, how a token is chosen, and when a text ends."""

from types import SimpleNamespace

import numpy as np
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
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

from plainllama.generation import (
    CompiledDecoder,
    Sampling,
    TextStream,
    filter_logits,
    generate,
    make_sampler,
)
from plainllama.huggingface import save_model
from plainllama.tokenizer import find_tokenizer


@every_family
def test_static_decoding_equals_the_full_forward_with_and_without_padding(changes):
    torch._dynamo.reset()
    model = random_model(**changes)
    prompts = [random_tokens(1, length)[0] for length in (5, 9)]
    for rows in ([prompts[0]], prompts):
        eager = generated(model, rows, 40)

        def step(*given):
            return model.unembed(model.hidden_states(*given))

        how = {"fullgraph": True, "backend": "eager", "dynamic": False}
        decoder = CompiledDecoder(torch.compile(step, **how) if len(rows) == 1 else step, 32)
        with torch._dynamo.config.patch(error_on_recompile=True):
            static = generated(model, rows, 40, decoder)  # through the end of the context
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


def test_a_text_longer_than_the_compiled_cache_gets_one_of_the_whole_context():
    model, sizes = random_model(), []
    expected = generated(model, [[1, 2, 3]], 20)

    def next_logits(tokens, positions, cache):
        sizes.append(cache.size)
        return model.unembed(model.hidden_states(tokens, positions, cache))

    decoder = CompiledDecoder(next_logits, 16)
    for count, columns in ((13, 16), (14, 32), (40, 32)):
        generated(model, [[1, 2, 3]], count, decoder)
        assert sizes[-1] == columns
    found = generated(model, [[1, 2, 3]], 20, decoder)
    for (logits, token), (exact, exact_token) in zip(found, expected, strict=True):
        close(logits, exact)
        assert token.tolist() == exact_token.tolist()


LENGTHS = [[1, 1], [5], [20, 20], [3, 7, 1, 20, 6]]


@pytest.mark.parametrize(
    "S, lengths, changes",
    [(S, lengths, {"n_kv_heads": 2}) for S in (1, 7) for lengths in LENGTHS]
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


@pytest.mark.parametrize("lengths", [[1, 5, 3], [32, 1, 31, 33, 90], [7, 7]])
def test_prompts_of_different_lengths_in_one_batch_are_continued_as_if_alone(lengths):
    model = random_model(n_kv_heads=2)
    prompts = [random_tokens(1, length)[0].tolist() for length in lengths]
    sampling = Sampling(seed=3, temperature=0.9, top_p=0.9)
    together = list(generate(model, prompts, 40, make_sampler(sampling, prompts)))
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 40, make_sampler(sampling, [prompt]))
        assert [int(tokens[row]) for tokens in together] == [int(token) for token in alone]


# --- Choosing a token ---

FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.8, "top_p": 0.7},
]


def settings_of(filters: dict, **others) -> Sampling:
    return Sampling(**{"temperature": 1.0} | filters | others)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # meant for embeddings
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_equal_those_of_transformers_in_their_order(filters, tmp_path):
    save_model(random_model(), tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)._get_logits_processor(
        GenerationConfig(do_sample=True, **{"top_k": 0} | filters)
    )
    torch.manual_seed(0)
    for scale in (0.3, 2.0, 9.0):
        logits = scale * torch.randn(64, 300)
        text = torch.randint(0, 300, (64, 40))
        seen = torch.zeros(64, 300, dtype=torch.bool).scatter(1, text, True)
        ours = filter_logits(
            logits, settings_of(filters), seen if "repetition_penalty" in filters else None
        )
        torch.testing.assert_close(ours, theirs(text, logits.clone()))


@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_frequencies_of_100k_samples_match_the_filtered_softmax(filters):
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, 60)
    config = settings_of(filters, seed=5, num_samples=1000, repetition_penalty=1.0)
    pick = make_sampler(config, [[0]])
    tokens = torch.cat([pick(logits.expand(1000, -1)) for _ in range(100)])
    counts = tokens.bincount(minlength=60).double()
    expected = 100_000 * filter_logits(logits, config).softmax(-1)[0].double()
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = max(1, int(allowed.sum()) - 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five deviations, for a fixed seed


def test_temperature_zero_and_near_zero_choose_the_likeliest_token():
    logits = torch.randn(8, 50)
    for temperature in (0.0, 1e-40):  # the second makes fp32 logits infinite
        pick = make_sampler(Sampling(temperature=temperature, num_samples=8), [[0]])
        assert torch.equal(pick(logits), logits.argmax(-1))


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_smallest_and_the_largest_random_number_choose_tokens_that_are_allowed(
    number, monkeypatch
):
    same = SimpleNamespace(random=lambda dtype: number)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: same)
    logits = torch.randn(2000, 50)
    logits[:, [0, -1]] = -50.0
    tokens = make_sampler(settings_of({"top_k": 40}), [[0]] * 2000)(logits)
    kept = logits.topk(40).indices
    assert (kept == tokens[:, None]).any(-1).all()


def test_a_sample_does_not_depend_on_how_many_are_made_beside_it():
    logits = torch.randn(20, 1, 50)
    alone = make_sampler(Sampling(seed=9, num_samples=1), [[0]])
    among = make_sampler(Sampling(seed=9, num_samples=7), [[0]])
    first = [int(alone(row)) for row in logits]
    batch = torch.stack([among(row.expand(7, -1)) for row in logits])
    assert batch[:, 0].tolist() == first
    assert len({tuple(column.tolist()) for column in batch.T}) == 7


# --- From tokens to text ---

BYTES = find_tokenizer("byte")


def stream_of(stop: tuple[str, ...] = (), limit: int = -1) -> TextStream:
    """A stream in which each byte of UTF-8 is a token, and 256 ends the text."""
    return TextStream(BYTES, [256], limit, stop)


@settings(deadline=None, max_examples=300)
@given(
    st.text("ab\u20ac\U0001f642", max_size=20),
    st.lists(st.text("ab\u20ac\U0001f642", min_size=1, max_size=4), max_size=3),
)
def test_what_is_printed_ends_before_the_first_stop_string(text, stop):
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stop))]
    expected = text
    if ends:
        whole = text[: ends[0]]
        expected = whole[: -max(len(s) for s in stop if whole.endswith(s))]
    stream = stream_of(tuple(stop))
    for token in text.encode():
        stream.add(token)
        assert expected.startswith(stream.ready)  # nothing that would have to be taken back
    assert bool(stream.ended) == bool(ends)
    if not ends:
        stream.end("max_new_tokens")
    assert stream.ready == expected


def test_a_stop_string_inside_of_a_token_ends_the_text_there():
    tokenizer = SimpleNamespace(stream=lambda: ["To be", ", or not"].__getitem__)
    stream = TextStream(tokenizer, [], -1, ["be, o"])
    stream.add(0)
    assert stream.take() == "To "
    stream.add(1)
    assert (stream.take(), stream.ended) == ("", "stop string 'be, o'")


def test_a_character_is_printed_when_its_last_byte_has_come_and_half_a_one_never():
    stream, printed = stream_of(), []
    for token in "\u00e9\u20ac\U0001f642".encode()[:-1]:
        stream.add(token)
        printed.append(stream.ready)
    stream.end("max_new_tokens")
    euro = "\u00e9\u20ac"
    assert [*printed, stream.ready] == ["", *euro[:1] * 3, *[euro] * 5]


@pytest.mark.parametrize(
    ("limit", "ended", "count"), [(-1, "end of text", 3), (2, "max_new_tokens", 2)]
)
def test_a_text_ends_at_end_of_text_or_at_its_limit_and_takes_no_more(limit, ended, count):
    stream = stream_of(limit=limit)
    for token in (97, 98, 256, 97):
        stream.add(token)
    assert (stream.ready, stream.ended, stream.n_tokens) == ("ab", ended, count)
