"""The whole transformer: config, layers, KV cache.

One set of modules makes six families, by the switches of ModelConfig: LLaMA and Mistral (the
default), Qwen2 (`qkv_bias`), Qwen3 (`qk_norm`), DeepSeek-V3 without experts (`use_mla`) and GPT-2
(learned `position`, `norm`, `mlp`, `bias`). LLaMA ends with LLaMaTransformer; what follows is for
generation (KVCache) and DeepSeek-V3 (LatentAttention).

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head width, S max_seq_len, V vocab,
R kv_lora_rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model as it was asked for; the properties give the widths that follow."""

    # model shape
    vocab_size: int = 0  # number of token ids; 0: as many as the data's tokenizer has
    n_layers: int = 6  # decoder blocks
    n_embd: int = 288  # width of the residual stream
    n_heads: int = 6  # attention heads
    n_kv_heads: int = 0  # key/value heads, each shared by n_heads / n_kv_heads; 0: n_heads
    head_dim: int = 0  # width of a head; 0: n_embd / n_heads, with use_mla the sum of its parts
    hidden_dim: int = 0  # width inside the feed-forward network; 0: 8/3 n_embd, with gelu 4 n_embd
    multiple_of: int = 32  # what a hidden_dim of 8/3 n_embd is rounded up to
    max_seq_len: int = 256  # longest context in tokens, and the length of a training window
    tie_embeddings: bool = True  # use the embedding matrix as the final linear layer too
    # advanced
    position: Literal["rope", "learned"] = "rope"  # rotary, or an embedding of each position
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # of the inputs of attention and feed-forward
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm, to the variance in LayerNorm
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # the feed-forward network
    bias: bool = False  # add biases in linear layers
    qkv_bias: bool = False  # add biases to queries, keys and values alone (Qwen2)
    qk_norm: bool = False  # normalise queries and keys, each head by itself (Qwen3)
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_factor: float = 0.0  # stretch low ones for longer contexts (Llama 3.1); 0: do not
    rope_low_freq_factor: float = 1.0  # with fewer turns in the original context: stretched in full
    rope_high_freq_factor: float = 4.0  # with more turns in the original context: left as they are
    rope_original_seq_len: int = 8192  # the context before stretching
    use_mla: bool = False  # keys and values come from one short vector (DeepSeek-V3)
    q_lora_rank: int = 0  # width of the latent of queries; 0: queries are projected directly
    kv_lora_rank: int = 256  # width of the latent of keys and values
    qk_nope_head_dim: int = 128  # width of the part of a head that has no position
    qk_rope_head_dim: int = 32  # width of the part that is rotated, its key shared by all heads
    v_head_dim: int = 128  # width of a head's values

    def __post_init__(self) -> None:
        """Refuse impossible shapes; a number is above 0, or may be 0 where that is its default."""
        for field in fields(ModelConfig):
            value, is_number = getattr(self, field.name), field.type in (int, float)
            if is_number and not (0 < value <= 1e9 or value == field.default == 0):
                raise ValueError(f"{field.name}={value} must be more than 0 and at most 1e9")
        if self.n_embd % self.n_heads != 0:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_heads={self.n_heads}")
        if self.n_heads % (K := self.kv_heads) != 0:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={K}")
        if self.rope_width % 2 != 0:
            name = "qk_rope_head_dim" if self.use_mla else "head_dim"
            raise ValueError(f"{name}={self.rope_width} must be even for RoPE")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        latent = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or (latent if self.use_mla else self.n_embd // self.n_heads)

    @property
    def hidden_width(self) -> int:
        swiglu = math.ceil(int(8 * self.n_embd / 3) / self.multiple_of) * self.multiple_of
        return self.hidden_dim or (swiglu if self.mlp == "swiglu" else 4 * self.n_embd)

    @property
    def rope_width(self) -> int:  # of the part of a head that is rotated
        rotated = self.qk_rope_head_dim if self.use_mla else self.head_width
        return rotated if self.position == "rope" else 0


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, in fp32, and scale (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x32.type_as(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm of the residual stream, (..., C) to (..., C)."""
    kind = nn.LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.n_embd, config.norm_eps)


def rope_frequencies(head_dim: int, theta: float, device: Any, stretch: tuple = ()) -> Tensor:
    """Return theta^(-2j/D) for each pair j of a head, (D/2), fp32.

    `stretch` is Llama 3.1's (factor, low, high, length): frequencies with fewer than `low` turns in
    `length` are divided by the factor, those with more than `high` are kept; between, it blends.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if stretch:
        factor, low, high, length = stretch
        kept = ((frequencies * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    return frequencies


def precompute_theta_pos_frequencies(
    max_seq_len: int, head_dim: int, theta: float, device: Any = None, stretch: tuple = ()
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of m * theta^(-2j/D) for position m and pair j, each (S, D/2), fp32.

    The rotary positions of arXiv:2104.09864, equation 15: (cos, sin) is the complex number by
    which pair j of a head is multiplied at position m.
    """
    positions = torch.arange(max_seq_len, device=device).float()
    angles = torch.outer(positions, rope_frequencies(head_dim, theta, device, stretch))
    return angles.cos(), angles.sin()  # (S, D/2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of each head, (..., D), by its position; cos and sin are (..., D/2).

    Pair j is (x[j], x[j + D/2]), the half-split layout of Hugging Face; Meta's own checkpoints
    pair neighbours (x[2j], x[2j + 1]) instead, so their wq and wk need permuting.
    """
    first, second = x.float().chunk(2, dim=-1)  # (..., D/2) each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, H, T, D), for q (B, H, T, D) and k, v (B, K, T', D).

    q sees the k where `mask` is True; without one, those up to its own position, or all if T is 1.
    The options, scale and dropout_p, are those of scaled_dot_product_attention.
    """
    B, H, T, D = q.shape
    if T == 1:  # the heads of a group become queries of its one key/value head: k is not copied
        q = q.reshape(B, k.size(1), -1, D)  # (B, K, H/K, D)
    causal, grouped = mask is None and T > 1, k.size(1) < q.size(1)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, enable_gqa=grouped, **options
    )
    return y.reshape(B, H, T, -1)


class Context(NamedTuple):
    """What the layers know beside the residual stream: where its tokens are, and the past."""

    positions: Tensor  # (T), columns of the cache; (B, T) where each row has several documents
    rope: tuple[Tensor, Tensor]  # cos and sin at these positions, (..., T, D/2)
    mask: Tensor | None  # see attend()
    cache: "KVCache | None"  # absent in training
    attend: Callable[..., Tensor] = attend  # decoding may take a faster one, of the same result
    dropout: float = 0.0  # how likely a number becomes 0


class Attention(nn.Module):
    """Causal self-attention; K key/value heads serve H query heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, K, D = config.n_embd, config.n_heads, config.kv_heads, config.head_width
        self.config, self.layer = config, layer
        qkv_bias = config.bias or config.qkv_bias
        self.wq = nn.Linear(C, H * D, bias=qkv_bias)
        self.wk = nn.Linear(C, K * D, bias=qkv_bias)
        self.wv = nn.Linear(C, K * D, bias=qkv_bias)
        self.wo = nn.Linear(H * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        heads = (-1, self.config.head_width)
        q = self.wq(x).unflatten(-1, heads)  # (B, T, H, D)
        k, v = self.wk(x).unflatten(-1, heads), self.wv(x).unflatten(-1, heads)  # (B, T, K, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position == "rope":
            cos, sin = (table.unsqueeze(-2) for table in context.rope)  # (..., T, 1, D/2)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.project(x, context)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, context.positions, k, v)
        y = context.attend(q, k, v, context.mask, dropout_p=context.dropout)  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (arXiv:2002.05202), or GPT-2's down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, hidden, self.mlp = config.n_embd, config.hidden_width, config.mlp
        if config.mlp == "swiglu":
            self.gate = nn.Linear(C, hidden, bias=config.bias)
        self.up = nn.Linear(C, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.mlp == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = (LatentAttention if config.use_mla else Attention)(config, layer)
        self.norm2 = make_norm(config)
        self.ffwd = FeedForward(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # In evaluation context.dropout is 0.
        attended = F.dropout(self.attention(self.norm1(x), context), context.dropout)
        x = x.type_as(attended) + attended  # under autocast the stream is bfloat16, as products are
        return x + F.dropout(self.ffwd(self.norm2(x)), context.dropout)


class LLaMaTransformer(nn.Module):
    """Token ids in, logits for the next token out (arXiv:2302.13971); of the other families too.

    In memory the vocabulary is padded to a multiple of 64, for faster products. Padding rows stay
    zero in training, for their logits are cropped before the loss, and are never written to disk.

    Three attributes are for training. `dropout` is how likely a number becomes 0 among attention's
    weights and what layers add to the stream. With `recompute`, the forward pass keeps only the
    inputs of blocks, and the backward pass computes the rest again. With `loss_chunks`, no logits
    are returned beside a loss; above 1, they are made in chunks, one at a time, in both passes.
    """

    dropout = 0.0
    recompute = False
    loss_chunks = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1")
        self.config = config
        padded_vocab = math.ceil(config.vocab_size / 64) * 64
        self.embeddings = nn.Embedding(padded_vocab, config.n_embd)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.n_embd)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(config, n) for n in range(config.n_layers))
        self.norm = make_norm(config)
        self.final_linear = nn.Linear(config.n_embd, padded_vocab, bias=False)
        if config.tie_embeddings:
            self.final_linear.weight = self.embeddings.weight
        if not self.embeddings.weight.is_meta:  # on the meta device there are shapes alone
            self.init_rope()
            for name, parameter in self.named_parameters():
                self.init_weight(name, parameter)

    def init_rope(self) -> None:
        """Make the tables cos and sin, (S, D/2), fp32; (S, 0) with learned positions."""
        c = self.config
        where = c.rope_low_freq_factor, c.rope_high_freq_factor, c.rope_original_seq_len
        stretch = (c.rope_factor, *where) if c.rope_factor else ()
        cos, sin = precompute_theta_pos_frequencies(
            c.max_seq_len, c.rope_width, c.rope_theta, self.embeddings.weight.device, stretch
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weight(self, name: str, weight: Tensor) -> None:
        """Draw a parameter: a matrix from N(0, 0.02²), one that writes to the stream smaller.

        Its deviation is divided by sqrt(2 n_layers), the number of such additions, so that the
        residual stream keeps its scale at any depth (GPT-2). Norms start at one, biases at zero.
        """
        to_stream = name.endswith(("attention.wo.weight", "ffwd.down.weight"))
        if weight.dim() == 2:
            depth = 2 * self.config.n_layers if to_stream else 1
            nn.init.normal_(weight, std=0.02 / math.sqrt(depth))
        else:
            nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
        if name in ("embeddings.weight", "final_linear.weight"):
            weight[self.config.vocab_size :] = 0

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: "KVCache | None" = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, loss) for tokens (B, T).

        A row of several documents has positions (B, T) that begin at 0 in each: none sees another.
        Logits are (B, T, V); with a cache, which is advanced by T, the last position's, (B, 1, V);
        beside a loss, None with loss_chunks. The loss is training_loss, in evaluation the nats, as
        mean or sum over targets (B, T) but -100. ValueError if cache and T pass max_seq_len.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.size(1)
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens do not fit max_seq_len={self.config.max_seq_len}")
        if positions is None:
            positions = torch.arange(start, end, device=tokens.device)
        h = self.hidden_states(tokens, positions, cache)
        if cache is not None:
            cache.length = end
        if targets is None:
            return self.unembed(h), None
        h, targets = h.flatten(0, 1), targets.flatten()  # (B T, C), (B T)
        if self.loss_chunks > 1:
            parts = zip(h.chunk(self.loss_chunks), targets.chunk(self.loss_chunks), strict=True)
            loss = sum(checkpoint(self.logits_and_loss, *p, use_reentrant=False)[1] for p in parts)
        else:
            logits, loss = self.logits_and_loss(h, targets)
        logits = None if self.loss_chunks else logits.view(*tokens.shape, -1)
        return logits, loss if reduction == "sum" else loss / (targets >= 0).sum()

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: "KVCache | None" = None,
        attend: Callable[..., Tensor] = attend,
    ) -> Tensor:
        """Return the residual stream after the last block, (B, T, C), with a cache (B, 1, C)."""
        h = self.embeddings(tokens)  # (B, T, C)
        if self.config.position == "learned":
            padded = 0 if cache is None or cache.padding is None else cache.padding[:, None]
            h = h + self.positions((positions - padded).clamp(min=0))
        rope = self.cos[positions], self.sin[positions]
        mask = None if cache is None else cache.mask(positions)
        if positions.dim() == 2:
            mask = document_mask(positions)
        dropout = self.dropout if self.training else 0.0
        context = Context(positions, rope, mask, cache, attend, dropout)
        for block in self.decoder_blocks:
            if self.recompute and cache is None:
                h = checkpoint(block, h, context, use_reentrant=False)
            else:
                h = block(h, context)
        return h if cache is None else h[:, -1:]

    def unembed(self, h: Tensor) -> Tensor:
        """Return the logits, (B, T, V), that the residual stream h, (B, T, C), stands for."""
        return self.final_linear(self.norm(h))[..., : self.config.vocab_size]

    def logits_and_loss(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, (n, V), of a part of the stream, (n, C), and its summed loss."""
        logits = self.unembed(h)
        nats = F.cross_entropy(logits.float(), targets, reduction="sum")  # without those of -100
        return logits, self.training_loss(nats, logits, targets) if self.training else nats

    def training_loss(self, nats: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return what training minimises: nats, and terms of one's own, unseen in evaluation."""
        return nats


class KVCache:
    """Keys and values of the tokens seen so far, in memory of fixed size; absent in training.

    Latent attention stores one key a token, [latent; rotated key], whose beginning is its value.
    """

    def __init__(
        self, config: ModelConfig, rows: int, like: Tensor, size: int = 0, static: bool = False
    ) -> None:
        """Make room for `size` tokens (0: max_seq_len) on the device and in the dtype of `like`.

        In a `static` cache a single token sees all columns, under a mask, so that shapes stay the
        same from token to token, as compiled code needs.
        """
        self.size = size or config.max_seq_len  # columns
        K, widths = config.kv_heads, [config.head_width, config.head_width]
        if config.use_mla:
            K, widths = 1, [config.kv_lora_rank + config.qk_rope_head_dim]
        shapes = [(rows, K, self.size, width) for width in widths]
        self.layers = [[like.new_zeros(shape) for shape in shapes] for _ in range(config.n_layers)]
        self.static = static
        self.restart()

    def restart(self, padding: Tensor | None = None, length: int = 0) -> None:
        """Forget all but `length` tokens. The first `padding` columns, (B), will be no tokens."""
        self.length = length  # columns in use
        self.padding = padding

    def repeat(self, count: int) -> None:
        """Make `count` adjacent copies of each row."""
        self.layers = [[x.repeat_interleave(count, dim=0) for x in layer] for layer in self.layers]
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(count)

    def visible(self, T: int) -> int:
        """Return how many columns the T tokens that come next look at."""
        return self.size if self.static and T == 1 else self.length + T

    def mask(self, positions: Tensor) -> Tensor | None:
        """Return which columns new tokens may see, up to (B, 1, T, visible); None: all before."""
        T, visible = len(positions), self.visible(len(positions))
        if self.padding is None and (visible == T or (T == 1 and not self.static)):
            return None
        keys, queries = torch.arange(visible, device=positions.device), positions[:, None]
        first = 0 if self.padding is None else self.padding[:, None, None, None]
        # Padding sees itself, because the softmax of a row that sees nothing would be nan.
        return ((first <= keys) & (keys <= queries)) | (keys == queries)

    def update(self, layer: int, positions: Tensor, *new: Tensor) -> list[Tensor]:
        """Store new keys (and values), (B, K, T, D), and return all that are visible."""
        for stored, x in zip(self.layers[layer], new, strict=True):
            stored.index_copy_(2, positions, x.type_as(stored))
        return [stored[:, :, : self.visible(len(positions))] for stored in self.layers[layer]]


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1), bias-free as in DeepSeek-V3.

    A token's keys and values are linear in one latent c, (R), shared by all heads, beside one
    rotated key. Decoding therefore moves these linear maps to the other side, q·(U c) = (Uᵀ q)·c,
    and is attention of H query heads to a single head of keys and values: the latents themselves.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, R, rank = config.n_embd, config.n_heads, config.kv_lora_rank, config.q_lora_rank
        eps = 1e-6  # DeepSeek-V3's for its latents, whatever the norm_eps of the blocks
        self.config, self.layer = config, layer
        if rank:
            self.wq_a = nn.Linear(C, rank, bias=False)
            self.q_norm = RMSNorm(rank, eps)
            self.wq_b = nn.Linear(rank, H * config.head_width, bias=False)
        else:
            self.wq = nn.Linear(C, H * config.head_width, bias=False)
        self.wkv_a = nn.Linear(C, R + config.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(R, eps)
        self.wkv = nn.Linear(R, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.wo = nn.Linear(H * config.v_head_dim, C, bias=False)

    def compress(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, D), latents (B, 1, T, R) and rotated keys (B, 1, T, rope)."""
        c, (B, T, _) = self.config, x.shape
        q = self.wq_b(self.q_norm(self.wq_a(x))) if c.q_lora_rank else self.wq(x)
        q = q.view(B, T, c.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        q, q_rotated = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        rope = [table.unsqueeze(-3) for table in context.rope]  # (..., 1, T, rope/2)
        q = torch.cat((q, apply_rope(q_rotated, *rope)), dim=-1)
        latent, key = self.wkv_a(x)[:, None].split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return q, self.kv_norm(latent), apply_rope(key, *rope)

    def expand(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (B, H, T, D) and values (B, H, T, v_head_dim) made of latents."""
        c, (B, _, T, _) = self.config, latent.shape
        kv = self.wkv(latent[:, 0]).view(B, T, c.n_heads, -1).transpose(1, 2)
        k, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        return torch.cat((k, key.expand(-1, c.n_heads, -1, -1)), dim=-1), v

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (B, H, T, D) and values (B, H, T, v_head_dim) of x (B, T, C)."""
        q, latent, key = self.compress(x, context)
        return q, *self.expand(latent, key)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        cache, T = context.cache, x.size(1)
        q, latent, key = self.compress(x, context)
        if cache is not None:
            (seen,) = cache.update(self.layer, context.positions, torch.cat((latent, key), dim=-1))
        if cache is None or cache.visible(T) == T:
            k, v = self.expand(latent, key)
            y = attend(q, k, v, context.mask, dropout_p=context.dropout)
        else:
            y = self.attend_latents(q, seen, context.mask)  # (B, H, T, v_head_dim)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def attend_latents(self, q: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        """Return what `attend` gives for the expanded keys and values of (B, 1, T', R + rope)."""
        c = self.config
        # While it is tuned, a layer's own weight is not all of it (plainllama/lora.py).
        weight = self.wkv.merged() if hasattr(self.wkv, "merged") else self.wkv.weight
        up = weight.view(c.n_heads, -1, c.kv_lora_rank)
        up_k, up_v = up.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)  # (H, …, R)
        q, q_rotated = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        q = torch.cat((q @ up_k, q_rotated), dim=-1)  # (B, H, T, R + rope)
        latent, scale = seen[..., : c.kv_lora_rank], c.head_width**-0.5
        y = attend(q, seen, latent, mask, scale=scale)  # (B, H, T, R)
        return y @ up_v.mT  # (B, H, T, v_head_dim)


def document_mask(positions: Tensor) -> Tensor:
    """Return which tokens of a row may be seen, (B, 1, T, T): earlier ones of the same document."""
    columns = torch.arange(positions.size(1), device=positions.device)
    first = columns - positions  # where a token's document begins, (B, T)
    return (first[:, :, None] == first[:, None, :]).tril()[:, None]
