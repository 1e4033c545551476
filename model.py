"""The whole transformer: config, layers, KV cache, generation.

One set of modules makes four families, by the switches of ModelConfig: LLaMA (the default), Qwen3
(`qk_norm`), DeepSeek-V3 without experts (`use_mla`) and GPT-2 (learned `position`, `norm`, `mlp`,
`bias`). checkpoint.py reads and writes each of them as Hugging Face does.

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head dim, S max_seq_len, V vocab,
R kv_lora_rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD_VOCAB_TO = 64  # matrix products are fastest when the vocabulary is a multiple of this
LATENT_NORM_EPS = 1e-6  # DeepSeek-V3's, whatever the norm_eps of its blocks

SWITCHES = ("position", "norm", "mlp", "bias", "qk_norm", "use_mla")
FAMILIES = {  # Hugging Face's model_type -> switches
    "llama": ("rope", "rmsnorm", "swiglu", False, False, False),
    "qwen3": ("rope", "rmsnorm", "swiglu", False, True, False),
    "deepseek_v3": ("rope", "rmsnorm", "swiglu", False, False, True),
    "gpt2": ("learned", "layernorm", "gelu", True, False, False),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; keys left at 0 are derived from the others."""

    vocab_size: int = 0
    """Number of token ids; 0: as many as the data's tokenizer has."""
    n_layers: int = 6
    """Decoder blocks."""
    n_embd: int = 288
    """Width of the residual stream."""
    n_heads: int = 6
    """Attention heads."""
    n_kv_heads: int = 0
    """Key/value heads, each shared by n_heads / n_kv_heads query heads; 0: n_heads."""
    head_dim: int = 0
    """Width of one head; 0: n_embd / n_heads, and with use_mla the sum of its two parts."""
    hidden_dim: int = 0
    """Width inside the feed-forward network; 0: 8/3 n_embd rounded up to multiple_of, gelu 4."""
    multiple_of: int = 32
    """What a derived hidden_dim is rounded up to."""
    max_seq_len: int = 256
    """Longest context in tokens, and the length of a training window."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm, to the variance in LayerNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the final linear layer too."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or an embedding of each position."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """What normalises the input of attention and feed-forward."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """The feed-forward network."""
    bias: bool = False
    """Add biases in linear layers."""
    qk_norm: bool = False
    """Normalise queries and keys, each head by itself (Qwen3)."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    rope_factor: float = 0.0
    """Stretch low rotary frequencies by this factor for longer contexts (Llama 3.1); 0: do not."""
    rope_low_freq_factor: float = 1.0
    """Frequencies with fewer turns in rope_original_seq_len are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """Frequencies with more turns in rope_original_seq_len stay as they are."""
    rope_original_seq_len: int = 8192
    """The context before stretching."""
    use_mla: bool = False
    """Multi-head latent attention (DeepSeek-V3): keys and values come from one short vector."""
    q_lora_rank: int = 0
    """Width of the latent of queries; 0: queries are projected directly."""
    kv_lora_rank: int = 256
    """Width of the latent of keys and values."""
    qk_nope_head_dim: int = 128
    """Width of the part of a head that has no position."""
    qk_rope_head_dim: int = 32
    """Width of the part of a head that is rotated, its key shared by all heads."""
    v_head_dim: int = 128
    """Width of a head's values."""

    def __post_init__(self) -> None:
        derived = ("vocab_size", "n_kv_heads", "head_dim", "hidden_dim")
        for field in fields(ModelConfig):
            value = getattr(self, field.name)
            may_be_0 = field.name in (*derived, "rope_factor", "q_lora_rank")
            if field.type in (int, float) and (value < 0 or (value == 0 and not may_be_0)):
                raise ValueError(f"{field.name}={value} must be more than 0")
        if self.n_embd % self.n_heads != 0:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_heads={self.n_heads}")
        head_dim, hidden_dim = self.n_embd // self.n_heads, 4 * self.n_embd
        if self.use_mla:
            head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.mlp == "swiglu":
            hidden_dim = math.ceil(int(8 * self.n_embd / 3) / self.multiple_of) * self.multiple_of
        values = {"n_kv_heads": self.n_heads, "head_dim": head_dim, "hidden_dim": hidden_dim}
        for name, value in values.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.rope_dim % 2 != 0:
            name = "qk_rope_head_dim" if self.use_mla else "head_dim"
            raise ValueError(f"{name}={self.rope_dim} must be even for RoPE")
        for name in ("n_kv_heads", "head_dim"):
            if self.family in ("gpt2", "deepseek_v3") and getattr(self, name) != values[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)}, but {self.family} has {values[name]}, "
                    "which follows from the other keys: leave it out"
                )

    @property
    def family(self) -> str:
        """Hugging Face's name for models with these switches; ValueError if there is none."""
        given = {name: getattr(self, name) for name in SWITCHES}
        differing = {
            family: {name: v for name, v in zip(SWITCHES, values, strict=True) if v != given[name]}
            for family, values in FAMILIES.items()
        }
        nearest = min(differing, key=lambda family: len(differing[family]))
        if not differing[nearest]:
            return nearest
        wanted = ", ".join(f"{name}={value}" for name, value in differing[nearest].items())
        changed = ", ".join(f"{name}={given[name]}" for name in differing[nearest])
        raise ValueError(
            f"no family of models has {changed} beside the other switches; "
            f"the nearest, {nearest}, has {wanted}"
        )

    @property
    def rope_dim(self) -> int:
        """Width of the part of a head that is rotated; 0 with learned positions."""
        if self.position == "learned":
            return 0
        return self.qk_rope_head_dim if self.use_mla else self.head_dim


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
    return {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}[config.norm](
        config.n_embd, config.norm_eps
    )


def precompute_theta_pos_frequencies(
    max_seq_len: int,
    head_dim: int,
    theta: float,
    device: torch.device | str | None = None,
    stretch: tuple[float, float, float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of m * theta^(-2j/D) for position m and pair j, each (S, D/2), fp32.

    The rotary positions of arXiv:2104.09864, equation 15: (cos, sin) is the complex number by
    which pair j of a head is multiplied at position m. `stretch` is Llama 3.1's (factor, low, high,
    original length): frequencies that turn less than `low` times in the original length are divided
    by the factor, those that turn more than `high` times are kept, and between them it is blended.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents  # (D/2)
    if stretch:
        factor, low, high, length = stretch
        kept = ((frequencies * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    positions = torch.arange(max_seq_len, device=device).float()
    angles = torch.outer(positions, frequencies)  # (S, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of each head by its position; x is (B, H, T, D), cos and sin (T, D/2).

    Pair j is (x[j], x[j + D/2]), the half-split layout of Hugging Face; Meta's own checkpoints
    pair neighbours (x[2j], x[2j + 1]) instead, so their wq and wk need permuting.
    """
    first, second = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, H, T, D), for q (B, H, T, D) and k, v (B, K, T', D).

    q sees the k where `mask` is True; without one, those up to its own position, or all if T is 1.
    """
    B, H, T, D = q.shape
    if T == 1:  # the heads of a group become queries of one head, so that k and v need no copies
        q = q.reshape(B, k.size(1), -1, D)
    causal, grouped = mask is None and T > 1, k.size(1) < q.size(1)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return y.reshape(B, H, T, -1) if T == 1 else y


class KVCache:
    """Keys and values of all tokens seen so far, in memory of fixed size; absent in training.

    Latent attention keeps one key a token, [latent; rotated key], whose beginning is its value.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        size: int = 0,
    ) -> None:
        self.size = size or config.max_seq_len  # columns
        heads, widths = config.n_kv_heads, (config.head_dim, config.head_dim)
        if config.use_mla:
            heads, widths = 1, (config.kv_lora_rank + config.qk_rope_head_dim, 0)
        self.layers = [
            [
                torch.zeros(batch_size, heads, self.size, width, device=device, dtype=dtype)
                for width in widths
            ]
            for _ in range(config.n_layers)
        ]  # keys and values, (B, K, size, D)
        self.length = 0  # columns in use
        self.visible = 0  # columns that `update` returns: those in use, or all if static
        self.static = False  # whether shapes stay the same from token to token, for compiling
        self.padding: Tensor | None = None  # how many columns, at the left, are no tokens, (B)

    def mask(self, positions: Tensor) -> Tensor | None:
        """Return which columns new tokens may see, up to (B, 1, T, visible); None: all before."""
        T = len(positions)
        if self.padding is None and (self.visible == T or (T == 1 and not self.static)):
            return None
        keys, queries = torch.arange(self.visible, device=positions.device), positions[:, None]
        first = 0 if self.padding is None else self.padding[:, None, None, None]
        # Padding sees itself, because the softmax of a row that sees nothing would be nan.
        return (first <= keys) & (keys <= queries) | (keys == queries)

    def update(self, layer: int, positions: Tensor, *new: Tensor) -> list[Tensor]:
        """Store the new keys and values, (B, K, T, D), and return the visible ones."""
        for stored, x in zip(self.layers[layer], new, strict=True):
            stored.index_copy_(2, positions, x.type_as(stored))
        return [stored[:, :, : self.visible] for stored in self.layers[layer]]

    def repeat(self, count: int) -> None:
        """Make `count` adjacent copies of each row."""
        for layer in self.layers:
            layer[:] = (stored.repeat_interleave(count, dim=0) for stored in layer)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(count)


class Context(NamedTuple):
    """What the layers know beside the residual stream: where its tokens are, and the past."""

    positions: Tensor  # (T), columns of the cache
    rope: tuple[Tensor, Tensor]  # cos and sin at these positions, (T, D/2)
    mask: Tensor | None  # see attend()
    cache: KVCache | None


class Attention(nn.Module):
    """Causal self-attention; K key/value heads serve H query heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, K, D = config.n_embd, config.n_heads, config.n_kv_heads, config.head_dim
        self.config, self.layer = config, layer
        self.wq = nn.Linear(C, H * D, bias=config.bias)
        self.wk = nn.Linear(C, K * D, bias=config.bias)
        self.wv = nn.Linear(C, K * D, bias=config.bias)
        self.wo = nn.Linear(H * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            w(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )  # (B, H, T, D), (B, K, T, D) twice
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.position == "rope":
            q, k = apply_rope(q, *context.rope), apply_rope(k, *context.rope)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, context.positions, k, v)
        y = attend(q, k, v, context.mask)  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, C)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1), bias-free as in DeepSeek-V3.

    A token's keys and values are linear in one latent c, (R), shared by all heads, beside one
    rotated key. Decoding therefore moves these linear maps to the other side, q·(U c) = (Uᵀ q)·c,
    and is attention of H query heads to a single head of keys and values: the latents themselves.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, R, rank = config.n_embd, config.n_heads, config.kv_lora_rank, config.q_lora_rank
        self.config, self.layer = config, layer
        if rank:
            self.wq_a = nn.Linear(C, rank, bias=False)
            self.q_norm = RMSNorm(rank, LATENT_NORM_EPS)
            self.wq_b = nn.Linear(rank, H * config.head_dim, bias=False)
        else:
            self.wq = nn.Linear(C, H * config.head_dim, bias=False)
        self.wkv_a = nn.Linear(C, R + config.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(R, LATENT_NORM_EPS)
        self.wkv = nn.Linear(R, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.wo = nn.Linear(H * config.v_head_dim, C, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        c, cache, (B, T, _) = self.config, context.cache, x.shape
        keys_and_values = [c.qk_nope_head_dim, c.v_head_dim]
        q = self.wq_b(self.q_norm(self.wq_a(x))) if c.q_lora_rank else self.wq(x)
        q = q.view(B, T, c.n_heads, c.head_dim).transpose(1, 2)  # (B, H, T, D)
        q, q_rotated = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        q_rotated = apply_rope(q_rotated, *context.rope)
        latent, k_rotated = self.wkv_a(x)[:, None].split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self.kv_norm(latent)  # (B, 1, T, R)
        k_rotated = apply_rope(k_rotated, *context.rope)  # (B, 1, T, rope_dim)
        scale = c.head_dim**-0.5
        if cache is not None:
            key = torch.cat((latent, k_rotated), dim=-1)
            k, _ = cache.update(self.layer, context.positions, key, latent[..., :0])
        if cache is None or cache.visible == T:
            kv = self.wkv(latent[:, 0]).view(B, T, c.n_heads, -1).transpose(1, 2)
            k, v = kv.split(keys_and_values, dim=-1)  # (B, H, T, D) each
            k = torch.cat((k, k_rotated.expand(-1, c.n_heads, -1, -1)), dim=-1)
            y = attend(torch.cat((q, q_rotated), dim=-1), k, v, context.mask, scale)
        else:
            up_k, up_v = self.wkv.weight.view(c.n_heads, -1, c.kv_lora_rank).split(
                keys_and_values, 1
            )
            q = torch.cat((q @ up_k, q_rotated), dim=-1)  # (B, H, T, R + rope_dim)
            y = (
                attend(q, k, k[..., : c.kv_lora_rank], context.mask, scale) @ up_v.mT
            )  # (B, H, T, v_head_dim)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (arXiv:2002.05202), or GPT-2's down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.mlp == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.hidden_dim, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.hidden_dim, bias=config.bias)
        self.down = nn.Linear(config.hidden_dim, config.n_embd, bias=config.bias)
        self.mlp = config.mlp

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
        x = x + self.attention(self.norm1(x), context)
        return x + self.ffwd(self.norm2(x))


class LLaMaTransformer(nn.Module):
    """Token ids in, logits for the next token out (arXiv:2302.13971).

    In memory the vocabulary is padded to a multiple of 64. The padding rows are zero, stay zero in
    training because their logits are cropped before the loss, and are never written to disk.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1")
        self.config = config
        padded_vocab = math.ceil(config.vocab_size / PAD_VOCAB_TO) * PAD_VOCAB_TO
        self.embeddings = nn.Embedding(padded_vocab, config.n_embd)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.n_embd)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(config, layer) for layer in range(config.n_layers)
        )
        self.norm = make_norm(config)
        self.final_linear = nn.Linear(config.n_embd, padded_vocab, bias=False)
        if config.tie_embeddings:
            self.final_linear.weight = self.embeddings.weight
        stretch = (config.rope_factor, config.rope_low_freq_factor, config.rope_high_freq_factor)
        cos, sin = precompute_theta_pos_frequencies(
            config.max_seq_len,
            config.rope_dim,
            config.rope_theta,
            stretch=(*stretch, config.rope_original_seq_len) if config.rope_factor else None,
        )  # (S, 0) with learned positions
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.decode: Callable | None = None  # `read`, compiled, where single tokens are to be read
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all matrices from N(0, 0.02²), those that write to the residual stream smaller.

        Their deviation is divided by sqrt(2 n_layers), the number of such additions, so that the
        stream keeps its scale at any depth (GPT-2). Norms start at one, biases at zero.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attention.wo.weight", "ffwd.down.weight"))
                nn.init.normal_(
                    weight, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        self.embeddings.weight[self.config.vocab_size :] = 0
        self.final_linear.weight[self.config.vocab_size :] = 0

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logits, loss) for tokens (B, T).

        Logits are (B, T, V); with a cache, which is then advanced by T, those of the last position
        alone, (B, 1, V). The loss is the mean cross-entropy in nats over targets (B, T), where -100
        is left out; without targets it is None. ValueError if T, or cache and T together, pass
        max_seq_len.
        """
        past = 0 if cache is None else cache.length
        end = past + tokens.size(1)
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens do not fit max_seq_len={self.config.max_seq_len}")
        read = self.read
        if cache is not None:
            cache.static = self.decode is not None and tokens.size(1) == 1
            cache.length, cache.visible = end, cache.size if cache.static else end
            read = self.decode if cache.static else read
        logits = read(tokens, torch.arange(past, end, device=tokens.device), cache)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def read(self, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        """Return the logits of tokens (B, T) at `positions` (T); see forward."""
        h = self.embeddings(tokens)  # (B, T, C)
        if self.config.position == "learned":
            padded = 0 if cache is None or cache.padding is None else cache.padding[:, None]
            h = h + self.positions((positions - padded).clamp(min=0))
        rope = self.cos[positions], self.sin[positions]
        context = Context(positions, rope, None if cache is None else cache.mask(positions), cache)
        for block in self.decoder_blocks:
            h = block(h, context)
        if cache is not None:
            h = h[:, -1:]  # (B, 1, C)
        return self.final_linear(self.norm(h))[..., : self.config.vocab_size]  # (B, T, V)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Tensor | list[list[int]],
        max_new_tokens: int,
        pick: Callable[[Tensor], Tensor],
        num_samples: int = 1,
    ) -> Iterator[Tensor]:
        """Yield the next ids, (B,), of B = num_samples times as many rows as there are prompts.

        `pick` chooses them from logits (B, V); a prompt's samples are adjacent, and it is read once
        for all of them. A prompt longer than max_seq_len loses its beginning. When a row's context
        is full, its newer half is read again as a new beginning and generation goes on from there.
        Shorter rows are padded at the left and read as if alone.
        """
        S, device = self.config.max_seq_len, self.cos.device
        rows = [torch.as_tensor(prompt, device=device)[-S:] for prompt in prompts]
        T = max(map(len, rows))
        context = unread = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])  # (B, T)
        padding = torch.tensor([T - len(row) for row in rows], device=device)  # (B)
        dtype, size = self.embeddings.weight.dtype, min(S, T + max_new_tokens)
        cache = KVCache(self.config, len(rows), device, dtype, size)
        for n in range(max_new_tokens):
            if cache.length == 0:
                cache.padding = padding if padding.any() else None
            logits, _ = self(unread, cache=cache)  # (B, 1, V)
            if n == 0 and num_samples > 1:
                cache.repeat(num_samples)
                logits, context, padding = (
                    x.repeat_interleave(num_samples, dim=0) for x in (logits, context, padding)
                )
            if n == 0 and self.decode is not None:
                for stored in sum(cache.layers, []):
                    # From here on it does not move, and CUDA graphs need not copy it.
                    torch._dynamo.mark_static_address(stored, guard=False)
            token = pick(logits[:, -1])  # (B,)
            yield token
            unread = token[:, None]  # (B, 1)
            context = torch.cat((context, unread), dim=1)  # (B, length + 1)
            if cache.length == S:
                padding = padding.where(padding > 0, S + 1 - max(1, S // 2))
                context = unread = context[:, padding.min() :]
                padding, cache.length = padding - padding.min(), 0

    def flops_per_token(self) -> int:
        """Return the FLOPs of one token's forward and backward pass (arXiv:2204.02311, appendix B).

        6 for each weight that multiplies it, the input embedding not counted, and 12 L H D T for
        attention over a full window.
        """
        c = self.config
        blocks = sum(p.numel() for p in self.decoder_blocks.parameters() if p.dim() == 2)
        head_dims = c.head_dim + (c.v_head_dim if c.use_mla else c.head_dim)
        attention = 6 * c.n_layers * c.n_heads * head_dims * c.max_seq_len
        return 6 * (blocks + c.vocab_size * c.n_embd) + attention

    def n_params(self) -> int:
        """Return the number of parameters as saved: padding left out, tied matrices once."""
        padding = self.embeddings.num_embeddings - self.config.vocab_size
        matrices = 1 if self.config.tie_embeddings else 2
        total = sum(p.numel() for p in self.parameters())
        return total - matrices * padding * self.config.n_embd


def find_device(name: str) -> tuple[torch.device, bool]:
    """Return the device called `name`, and whether it is fast at bfloat16.

    `auto` is the accelerator if there is one, else the CPU. ValueError if it cannot be used.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(accelerator or "cpu") if name == "auto" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used ({reason}); --device=cpu can") from None
    if device.type == "cuda":
        return device, torch.cuda.is_bf16_supported(including_emulation=False)
    return device, device.type == "cpu" and torch.cpu._is_amx_tile_supported()
