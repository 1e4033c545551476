"""The whole LLaMA transformer: config, layers, KV cache, generation, Hugging Face directories.

Reads and writes Hugging Face model directories (config.json, model.safetensors) of the class
LlamaForCausalLM: what `save_pretrained` writes, transformers loads with equal logits, and back.

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head dim, S max_seq_len, V vocab.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PAD_VOCAB_TO = 64  # matrix products are fastest when the vocabulary is a multiple of this


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA; keys left at 0 are derived from the others."""

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
    """Width of one head; 0: n_embd / n_heads."""
    hidden_dim: int = 0
    """Width inside the feed-forward network; 0: 8/3 n_embd rounded up to multiple_of."""
    multiple_of: int = 32
    """What a derived hidden_dim is rounded up to."""
    max_seq_len: int = 256
    """Longest context in tokens, and the length of a training window."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the final linear layer too."""

    def __post_init__(self) -> None:
        positive = ("n_layers", "n_embd", "n_heads", "multiple_of", "max_seq_len", "norm_eps")
        derived = ("vocab_size", "n_kv_heads", "head_dim", "hidden_dim")
        for name in (*positive, "rope_theta", *derived):
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in derived):
                raise ValueError(f"{name}={value} must be more than 0")
        if self.n_embd % self.n_heads != 0:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_heads={self.n_heads}")
        values = {
            "n_kv_heads": self.n_kv_heads or self.n_heads,
            "head_dim": self.head_dim or self.n_embd // self.n_heads,
            "hidden_dim": self.hidden_dim
            or math.ceil(int(8 * self.n_embd / 3) / self.multiple_of) * self.multiple_of,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"head_dim={self.head_dim} (n_embd={self.n_embd} / n_heads={self.n_heads}) "
                "must be even for RoPE"
            )


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


def precompute_theta_pos_frequencies(
    max_seq_len: int, head_dim: int, theta: float, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of m * theta^(-2j/D) for position m and pair j, each (S, D/2), fp32.

    The rotary positions of arXiv:2104.09864, equation 15: (cos, sin) is the complex number by
    which pair j of a head is multiplied at position m.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponents  # (D/2)
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


class KVCache:
    """Keys and values of all tokens seen so far, in memory of fixed size; absent in training."""

    def __init__(
        self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        size = (config.n_layers, batch_size, config.n_kv_heads, config.max_seq_len, config.head_dim)
        self.keys = torch.empty(size, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # columns in use
        self.padding: Tensor | None = None  # how many of them, at the left, are no tokens, (B)

    def mask(self, T: int) -> Tensor | None:
        """Return what T new tokens may see, up to (B, 1, T, length + T); None: all before them."""
        if self.padding is None and (T == 1 or self.length == 0):
            return None
        keys = torch.arange(self.length + T, device=self.keys.device)
        queries = keys[self.length :, None]  # (T, 1)
        first = 0 if self.padding is None else self.padding[:, None, None, None]
        # Padding sees itself, because the softmax of a row that sees nothing would be nan.
        return (first <= keys) & (keys <= queries) | (keys == queries)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v, (B, K, T, D), and return all of them, (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention; K key/value heads serve H query heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.wq = nn.Linear(config.n_embd, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.n_embd, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.n_embd, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.wk(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)

        mask = None if cache is None else cache.mask(T)
        causal = mask is None and T > 1
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.size(1) < q.size(1)
        )  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.n_embd, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config, layer)
        self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffwd = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin, cache)
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
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(config, layer) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.final_linear = nn.Linear(config.n_embd, padded_vocab, bias=False)
        if config.tie_embeddings:
            self.final_linear.weight = self.embeddings.weight
        cos, sin = precompute_theta_pos_frequencies(
            config.max_seq_len, config.head_dim, config.rope_theta
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all matrices from N(0, 0.02²), those that write to the residual stream smaller.

        Their deviation is divided by sqrt(2 n_layers), the number of such additions, so that the
        stream keeps its scale at any depth (GPT-2). Norms start at one.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attention.wo.weight", "ffwd.down.weight"))
                nn.init.normal_(
                    weight, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                )
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
        h = self.embeddings(tokens)  # (B, T, C)
        for block in self.decoder_blocks:
            h = block(h, self.cos[past:end], self.sin[past:end], cache)
        if cache is not None:
            cache.length = end
            h = h[:, -1:]  # (B, 1, C)
        h = self.norm(h)
        logits = self.final_linear(h)[..., : self.config.vocab_size]  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.inference_mode()
    def generate(
        self, prompts: Tensor | list[list[int]], max_new_tokens: int, pick: Callable
    ) -> Iterator[Tensor]:
        """Yield the ids, (B,), that follow B prompts; `pick` chooses them from logits (B, V).

        A prompt longer than max_seq_len loses its beginning. When a row's context is full, its
        newer half is read again as a new beginning and generation goes on from there. Shorter rows
        are padded at the left and read as if alone, for RoPE sees only distances.
        """
        S, device = self.config.max_seq_len, self.cos.device
        rows = [torch.as_tensor(prompt, device=device)[-S:] for prompt in prompts]
        T = max(map(len, rows))
        context = unread = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])  # (B, T)
        padding = torch.tensor([T - len(row) for row in rows], device=device)  # (B)
        cache = KVCache(self.config, len(rows), device, self.final_linear.weight.dtype)
        for _ in range(max_new_tokens):
            if cache.length == 0:
                cache.padding = padding if padding.any() else None
            logits, _ = self(unread, cache=cache)
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
        attention = 12 * c.n_layers * c.n_heads * c.head_dim * c.max_seq_len
        return 6 * (blocks + c.vocab_size * c.n_embd) + attention

    def n_params(self) -> int:
        """Return the number of parameters as saved: padding left out, tied matrices once."""
        padding = self.embeddings.num_embeddings - self.config.vocab_size
        matrices = 1 if self.config.tie_embeddings else 2
        total = sum(p.numel() for p in self.parameters())
        return total - matrices * padding * self.config.n_embd

    def save_pretrained(self, directory: Path, end_of_text: int | None = None) -> None:
        """Write config.json, generation_config.json and model.safetensors (fp32) to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            **{theirs: getattr(self.config, ours) for ours, theirs in CONFIG_NAMES.items()},
            **FIXED_SETTINGS,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "torch_dtype": "float32",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.config.rope_theta},
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
        }
        generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        write_json(directory / "config.json", settings)
        write_json(directory / "generation_config.json", generation)
        weights = {
            name: weight.cpu().float().contiguous() for name, weight in self.checkpoint().items()
        }
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: Path, max_seq_len: int = 0) -> "LLaMaTransformer":
        """Read a LlamaForCausalLM directory into fp32 on the CPU; max_seq_len > 0 shortens it.

        ValueError, on one line, for whatever is missing, damaged or of another architecture.
        """
        config = read_config(directory)
        if max_seq_len > config.max_seq_len:
            raise ValueError(
                f"max_seq_len={max_seq_len} is more than the {config.max_seq_len} of {directory}"
            )
        model = cls(replace(config, max_seq_len=max_seq_len or config.max_seq_len))
        model.load_weights(directory / "model.safetensors")
        return model

    def load_weights(self, path: Path) -> None:
        """Copy the tensors of a LlamaForCausalLM safetensors file into the parameters."""
        if not path.is_file():
            pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt"))
            reason = f"; {pickles[0]} is a pickle, which can run code and is never read"
            raise ValueError(f"no {path.name} in {path.parent}{reason if pickles else ''}")
        try:
            with safe_open(path, framework="pt") as file:
                expected, found = self.checkpoint(), set(file.keys())
                unknown = {n for n in found - expected.keys() if "inv_freq" not in n}
                wrong = expected.keys() - found | unknown - {"lm_head.weight"}
                if wrong:
                    what = "lacks" if wrong - found else "has more than config.json says:"
                    raise ValueError(f"{path} {what} {len(wrong)} tensors, one {min(wrong)}")
                for name, weight in expected.items():
                    tensor = file.get_tensor(name)
                    if tensor.shape != weight.shape:
                        raise ValueError(
                            f"{path}: {name} is {tuple(tensor.shape)}, "
                            f"config.json makes it {tuple(weight.shape)}"
                        )
                    weight.copy_(tensor)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error

    def checkpoint(self) -> dict[str, Tensor]:
        """Return Hugging Face's name -> parameter, without the padding rows and tied twins."""
        V = self.config.vocab_size
        names = {
            ours.format(layer): theirs.format(layer)
            for ours, theirs in TENSOR_NAMES.items()
            for layer in range(self.config.n_layers if "{}" in ours else 1)
        }
        return {
            names[name]: weight.detach()[:V] if name in PADDED else weight.detach()
            for name, weight in self.named_parameters()
        }


CONFIG_NAMES = {  # ModelConfig -> config.json of LlamaForCausalLM
    "vocab_size": "vocab_size",
    "n_layers": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
PADDED = ("embeddings.weight", "final_linear.weight")  # the parameters with a row a token
FIXED_SETTINGS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
TENSOR_NAMES = {  # parameters -> tensors of LlamaForCausalLM; {} is the layer
    "embeddings.weight": "model.embed_tokens.weight",
    "decoder_blocks.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
    "decoder_blocks.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "decoder_blocks.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "decoder_blocks.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "decoder_blocks.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "decoder_blocks.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "decoder_blocks.{}.ffwd.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "decoder_blocks.{}.ffwd.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "decoder_blocks.{}.ffwd.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "final_linear.weight": "lm_head.weight",
}


def read_config(directory: Path) -> ModelConfig:
    """Read a LlamaForCausalLM config.json; ValueError for any setting that this model lacks."""
    path = directory / "config.json"
    settings = read_json(path)
    if settings.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type {settings.get('model_type')!r}; known: 'llama'")
    for key, value in FIXED_SETTINGS.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key}={settings[key]!r} is not supported, only {value!r}")
    if settings.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights are not supported")
    rope: dict = {}
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        rope |= settings.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"{path}: RoPE scaling {rope_type!r} is not supported")
    settings.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    settings.setdefault("tie_word_embeddings", False)
    settings.setdefault("num_key_value_heads", settings.get("num_attention_heads"))
    settings["head_dim"] = settings.get("head_dim") or 0
    try:
        return ModelConfig(**{ours: settings[theirs] for ours, theirs in CONFIG_NAMES.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is incomplete: {error}") from error


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


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError names the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: no JSON object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object, indented, UTF-8."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
