"""model.py against torch's own counters and plain formulas, on models of a few kB."""

import math
import runpy

import pytest
import torch
from helpers import (
    GPT2,
    LATENT,
    ROOT,
    close,
    every_family,
    every_shape,
    generated,
    greedy,
    random_model,
    random_tokens,
    refusal,
    shape,
)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import (
    Attention,
    Context,
    FeedForward,
    KVCache,
    LatentAttention,
    LLaMaTransformer,
    ModelConfig,
    RMSNorm,
    apply_rope,
    precompute_theta_pos_frequencies,
)
from plainllama.generation import generate
from plainllama.huggingface import save_model
from plainllama.machine import flops_per_token

tied_and_untied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    """On tensors this small a second thread only waits for the first."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The padded vocabulary --------------------------------------------------------------------


@tied_and_untied
def test_padding_rows_stay_zero_in_training_and_are_not_saved(tmp_path, tied):
    model, tokens = LLaMaTransformer(shape(tie_embeddings=tied)), random_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, tokens)[1].backward()
        optimizer.step()
    matrices = [model.embeddings.weight, model.final_linear.weight]
    assert [matrix.shape for matrix in matrices] == [(320, 48)] * 2
    assert not any(matrix[257:].any() for matrix in matrices)

    save_model(model, tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert on_disk["model.embed_tokens.weight"].shape == (257, 48)
    assert ("lm_head.weight" in on_disk) is not tied


# --- Layers against formulas ------------------------------------------------------------------


def test_rmsnorm_equals_the_formula_and_does_not_centre():
    norm, x = RMSNorm(48, eps=1e-5), 3 + 2 * torch.randn(4, 48)
    close(norm(x).pow(2).mean(dim=-1).sqrt(), torch.ones(4))
    assert (norm(x).mean(dim=-1) > 0.5).all()
    torch.nn.init.normal_(norm.weight)
    close(norm(x), norm.weight * x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-5))


def test_rmsnorm_squares_in_fp32():
    x = torch.full((1, 48), 1e4, dtype=torch.float16)  # its square passes float16's 65,504
    close(RMSNorm(48, eps=1e-5).half()(x), torch.ones_like(x), atol=0)


def test_rope_frequencies_equal_the_formula():
    freqs = torch.complex(*precompute_theta_pos_frequencies(16, 8, 10000.0))
    m, j = torch.arange(16.0)[:, None], torch.arange(4.0)
    close(freqs, torch.exp(1j * m * 10000.0 ** (-2 * j / 8)))
    close(freqs.abs(), torch.ones(16, 4))
    close(freqs[0], torch.ones(4, dtype=torch.complex64), atol=0)


def test_rope_multiplies_the_halves_as_complex_numbers():
    x = torch.randn(1, 2, 16, 8)
    cos, sin = precompute_theta_pos_frequencies(16, 8, 10000.0)
    rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    close(apply_rope(x, cos, sin), torch.cat((rotated.real, rotated.imag), dim=-1))


def test_swiglu_equals_the_formula():
    ffwd, x = FeedForward(shape(hidden_dim=67)), torch.randn(2, 48)
    gate, up, down = ffwd.gate.weight, ffwd.up.weight, ffwd.down.weight
    a = x @ gate.T
    close(ffwd(x), (a * torch.sigmoid(a) * (x @ up.T)) @ down.T)


def test_gelu_feed_forward_equals_the_formula():
    ffwd, x = FeedForward(shape(**GPT2)), torch.randn(2, 48)
    a = ffwd.up(x)
    gelu = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    close(ffwd(x), ffwd.down(gelu))
    assert ffwd.up.weight.shape == (192, 48)


@pytest.mark.parametrize("n_embd, multiple_of, hidden", [(48, 32, 128), (50, 4, 136), (46, 1, 122)])
def test_hidden_dim_is_8_thirds_of_n_embd_rounded_up(n_embd, multiple_of, hidden):
    assert ModelConfig(n_embd=n_embd, n_heads=1, multiple_of=multiple_of).hidden_width == hidden


def full_window(length: int, head_dim: int) -> Context:
    """What a layer knows of a window that it sees for the first time."""
    rope = precompute_theta_pos_frequencies(length, head_dim, 10000.0)
    return Context(torch.arange(length), rope, mask=None, cache=None)


def test_attention_equals_the_formula():
    attention, x = Attention(shape(n_kv_heads=2), layer=0), torch.randn(2, 9, 48)
    rope = precompute_theta_pos_frequencies(9, 12, 10000.0)
    q, k, v = (
        w(x).unflatten(-1, (-1, 12)).transpose(1, 2)
        for w in (attention.wq, attention.wk, attention.wv)
    )
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = apply_rope(q, *rope) @ apply_rope(k, *rope).mT / math.sqrt(12)
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(dim=-1)
    expected = attention.wo((weights @ v).transpose(1, 2).flatten(2))
    close(attention(x, full_window(9, 12)), expected)


def test_latent_attention_equals_the_formula():
    config = shape(**LATENT, q_lora_rank=24)
    attention, x = LatentAttention(config, layer=0), torch.randn(2, 9, 48)
    context = full_window(9, 8)
    q = attention.wq_b(attention.q_norm(attention.wq_a(x))).view(2, 9, 4, 20).transpose(1, 2)
    latent, shared = attention.wkv_a(x).split([16, 8], dim=-1)
    kv = attention.wkv(attention.kv_norm(latent)).view(2, 9, 4, 22).transpose(1, 2)
    q_rotated = apply_rope(q[..., 12:], *context.rope)
    k_rotated = apply_rope(shared[:, None], *context.rope)
    scores = (q[..., :12] @ kv[..., :12].mT + q_rotated @ k_rotated.mT) / math.sqrt(20)
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(dim=-1)
    expected = attention.wo((weights @ kv[..., 12:]).transpose(1, 2).flatten(2))
    close(attention(x, context), expected)


@every_family
@pytest.mark.parametrize("t", [1, 16, 31])
def test_future_tokens_do_not_change_past_logits(t, changes):
    model, tokens = random_model(**changes), random_tokens()
    changed = tokens.clone()
    changed[:, t] += 1
    before, after = model(tokens)[0], model(changed)[0]
    close(after[:, :t], before[:, :t], atol=0)
    assert (after[:, t:] - before[:, t:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_converted_model_computes_and_generates_in_its_dtype(dtype):
    model, tokens = random_model().to(dtype), random_tokens(length=4)
    assert model(tokens)[0].dtype == dtype
    assert {logits.dtype for logits, _ in generated(model, tokens, 3)} == {dtype}


# --- Loss, gradients, initialisation ----------------------------------------------------------


def test_loss_is_the_mean_negative_log_probability_of_targets_that_are_not_ignored():
    model, tokens, targets = random_model(), random_tokens(), random_tokens().roll(-1, dims=1)
    logits, loss = model(tokens, targets)
    log_p = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    close(loss, -log_p.mean())
    targets[:, ::3] = -100
    close(model(tokens, targets)[1], -log_p[targets != -100].mean())


@tied_and_untied
def test_initial_loss_is_about_ln_v(tied):
    model = LLaMaTransformer(shape(vocab_size=4096, tie_embeddings=tied))
    tokens, targets = random_tokens(64, 33, vocab_size=4096).unfold(1, 32, 1).unbind(dim=1)
    assert model(tokens, targets)[1].item() == pytest.approx(math.log(4096), abs=0.1)


def test_matrices_start_at_002_and_those_into_the_residual_stream_smaller_with_depth():
    model = LLaMaTransformer(shape(n_embd=128, n_layers=8, tie_embeddings=False))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        residual = name.endswith(("wo.weight", "down.weight"))
        # 16,384 samples or more: their standard deviation has a relative error of 0.6%
        assert weight[:257].std().item() == pytest.approx(0.005 if residual else 0.02, rel=0.03)


@every_shape
def test_every_parameter_gets_a_finite_gradient(changes):
    model = random_model(**changes)
    model(random_tokens(), random_tokens())[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@every_family
@pytest.mark.parametrize("how", ["plain", "dropout", "bfloat16"])
def test_less_memory_in_training_gives_equal_loss_and_gradients(changes, how):
    targets = random_tokens().roll(-1, dims=1)
    targets[0, :9] = -100

    def loss_and_gradients(recompute, loss_chunks, reduction):
        model = random_model(**changes).train()
        model.recompute, model.loss_chunks = recompute, loss_chunks
        model.dropout = 0.3 if how == "dropout" else 0.0
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"):
            logits, loss = model(random_tokens(), targets, reduction=reduction)
        assert (logits is None) == (loss_chunks > 0)
        loss.backward()
        assert not model.final_linear.weight.grad[257:].any()  # of padding
        return [loss, *(parameter.grad for parameter in model.parameters())]

    for reduction in ("mean", "sum") if how == "plain" else ("sum",):
        whole = loss_and_gradients(False, 1, reduction)
        for less in (
            loss_and_gradients(True, 5, reduction),
            loss_and_gradients(False, 0, reduction),
        ):
            if how != "bfloat16":
                close(less, whole)
                continue
            for found, expected in zip(less, whole, strict=True):  # the head's is a sum of parts
                assert (found - expected).norm() <= 4 * 2**-8 * expected.norm()


def test_dropout_takes_attention_weights_and_additions_to_the_stream():
    block, x = random_model().decoder_blocks[0], torch.randn(2, 32, 48)
    context = full_window(32, 12)
    half = context._replace(dropout=0.5)
    torch.manual_seed(1)
    found, expected = (block.attention(x, c) for c in (half, context))
    assert (found - expected).abs().min() > 0  # before anything is added
    with torch.no_grad():
        block.attention.wo.weight.zero_()
    added, alone = block(x, half) - x, block(x, context) - x
    kept = added != 0
    assert 0.45 < kept.float().mean() < 0.55
    close(added[kept], 2 * alone[kept])


@every_family
def test_evaluation_knows_no_dropout(changes):
    model, tokens = random_model(**changes), random_tokens()
    expected = model(tokens)[0]
    model.dropout = 0.5
    close(model(tokens)[0], expected, atol=0)
    assert (model.train()(tokens)[0] - expected).abs().max() > 0.1


class WithZLoss(LLaMaTransformer):
    """What a reader adds to the loss, in the one place for it."""

    def training_loss(self, nats, logits, targets):
        return nats + 0.1 * logits.logsumexp(-1).square()[targets >= 0].sum()


@pytest.mark.parametrize("way", ["logits kept", "whole", "in chunks", "compiled"])
def test_a_further_term_of_the_loss_is_trained_in_every_way_and_never_evaluated(way):
    plain, model = random_model(n_layers=1), WithZLoss(shape(n_layers=1))
    model.load_state_dict(plain.state_dict())
    model.loss_chunks = {"whole": 1, "in chunks": 5}.get(way, 0)
    tokens, targets = random_tokens(), random_tokens().roll(-1, dims=1)
    targets[:, ::3] = -100
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    call = graph if way == "compiled" else model
    logits, nats = plain(tokens, targets, reduction="sum")
    z = logits[targets >= 0].logsumexp(-1).square().sum()
    expected = nats + 0.1 * z
    trained = call(tokens, targets, reduction="sum")[1]
    close(trained, expected)
    trained.backward()
    expected.backward()
    gradients = [[p.grad for p in m.parameters()] for m in (model, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)
    model.eval()
    close(call(tokens, targets, reduction="sum")[1], nats)


def test_logits_beside_a_loss_have_their_gradient():
    model, tokens = random_model(), random_tokens()
    logits, _ = model(tokens, tokens)
    alone, _ = model(tokens)
    found = [torch.autograd.grad(x.square().mean(), model.norm.weight) for x in (logits, alone)]
    close(*[list(gradient) for gradient in found])


def test_autocast_to_bfloat16_gives_nearly_the_same_loss_and_generates():
    model, tokens = random_model(), random_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)[1]
        assert len(list(generate(model, tokens[:, :4], 3, greedy))) == 3
    close(loss, model(tokens, tokens)[1], atol=0.05)  # bfloat16 keeps 8 bits: 0.4% of a loss of 7


# --- Counting ---------------------------------------------------------------------------------


@every_family
def test_flops_per_token_equal_those_that_torch_counts(changes):
    model, tokens = LLaMaTransformer(shape(**changes | {"vocab_size": 128})), random_tokens()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens)[1].backward()
    assert counter.get_total_flops() == flops_per_token(model) * tokens.numel()


@tied_and_untied
def test_flops_per_token_equal_the_formula_for_the_true_vocabulary(tied):
    L, C, T, V, hidden = 2, 48, 32, 257, 128
    flops = 6 * (L * (4 * C * C + 3 * C * hidden) + V * C) + 12 * L * C * T
    assert flops_per_token(LLaMaTransformer(shape(tie_embeddings=tied))) == flops


# --- Cache and generation ---------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("chunks", [[1] * 32, [5, 1, 17, 1, 8], [1, 31]], ids=str)
def test_cached_logits_equal_the_full_forward(chunks, changes):
    model, tokens = random_model(**changes), random_tokens()
    cache = KVCache(model.config, 2, model.embeddings.weight)
    with torch.no_grad():
        full, _ = model(tokens)
        for chunk in tokens.split(chunks, dim=1):
            logits, _ = model(chunk, cache=cache)
            close(logits, full[:, cache.length - 1 : cache.length])


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_embd": 10, "n_heads": 3}, ["n_embd=10", "n_heads=3"]),
        ({"n_embd": 48, "n_heads": 4, "n_kv_heads": 3}, ["n_heads=4", "n_kv_heads=3"]),
        ({"head_dim": 7}, ["head_dim=7", "even for RoPE"]),
        (LATENT | {"qk_rope_head_dim": 7}, ["qk_rope_head_dim=7", "even for RoPE"]),
        (LATENT | {"kv_lora_rank": 0}, ["kv_lora_rank=0"]),
        ({"n_layers": 0}, ["n_layers=0"]),
        ({"n_kv_heads": -1}, ["n_kv_heads=-1"]),
        ({"max_seq_len": 0}, ["max_seq_len=0"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
    ],
    ids=str,
)
def test_an_impossible_shape_is_refused(changes, words):
    with refusal(*words):
        LLaMaTransformer(ModelConfig(**({"vocab_size": 257} | changes)))


def test_a_new_number_of_the_shape_needs_one_line(tmp_path):
    """It is above 0, or may be 0 where that is its default."""
    text, place = (ROOT / "model.py").read_text(encoding="utf-8"), "    bias: bool = False"
    fields = "    slope: float = 0.0  # a new one\n    width: int = 3  # another\n"
    text = text.replace(place, fields + place)
    (tmp_path / "changed.py").write_text(text, encoding="utf-8")
    config = runpy.run_path(str(tmp_path / "changed.py"))["ModelConfig"]
    assert (config().slope, config(slope=0.5).slope, config(width=1).width) == (0.0, 0.5, 1)
    for changes, words in (({"slope": -1.0}, "slope=-1.0"), ({"width": 0}, "width=0")):
        with refusal(words, "must be more than 0"):
            config(**changes)


def test_more_tokens_than_max_seq_len_are_refused():
    model = random_model()
    cache = KVCache(model.config, 2, model.embeddings.weight)
    with refusal("33", "max_seq_len=32"):
        model(random_tokens(length=33))
    model(random_tokens(length=30), cache=cache)
    with refusal("35", "max_seq_len=32"):
        model(random_tokens(length=5), cache=cache)
