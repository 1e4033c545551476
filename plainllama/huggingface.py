"""Models as Hugging Face directories, read and written: weights, and the files beside them.

What `save_model` writes, transformers loads with equal logits, and `load_model` reads what
transformers writes: LlamaForCausalLM, Qwen3ForCausalLM, DeepseekV3ForCausalLM without experts and
GPT2LMHeadModel, in any floating-point format, in one file or in shards. Nothing is ever unpickled.
"""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from model import LLaMaTransformer, ModelConfig, shapes_of
from plainllama.distributed import fill, materialize, to_full, to_local
from plainllama.families import FAMILIES, family_of, read_config, write_config
from plainllama.machine import check_memory
from plainllama.settings import UserError, fits, read_json, to_json, write_json
from plainllama.tokenizer import Tokenizer

LARGEST_FILE = 5_000_000_000  # bytes of tensors in a file, as transformers has it
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}


def index_of(path: Path) -> Path:
    """Return the file that says which of several files each tensor is in."""
    return path.with_name(f"{path.name}.index.json")


def save_tensors(
    path: Path, like: dict[str, Tensor], read: Callable[[str], Tensor], writes: bool = True
) -> None:
    """Write the tensors that `read` returns, of shapes and dtypes as in `like`, to `path`.

    More than LARGEST_FILE bytes go to NAME-00001-of-0000N.safetensors and an index. One tensor at a
    time is in memory. All processes that share the tensors out call this, and read all tensors in
    this order; the one with `writes` writes.
    """
    files: list[list[str]] = [[]]
    room = LARGEST_FILE
    for name, tensor in like.items():
        if tensor.nbytes > room and files[-1]:
            files.append([])
            room = LARGEST_FILE
        files[-1].append(name)
        room -= tensor.nbytes
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = path.name if len(files) == 1 else numbered(path, number, len(files))
        weight_map |= dict.fromkeys(names, file)
        if writes:
            write_file(path.with_name(file), {name: like[name] for name in names}, read)
        else:
            for name in names:
                read(name)
    if writes and len(files) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in like.values())}
        write_json(index_of(path), {"metadata": total, "weight_map": weight_map})


def write_file(path: Path, like: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write one safetensors file: the length of a JSON header, the header, and the numbers.

    safetensors' own save_file wants all tensors in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        place = [end, end := end + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, expected in like.items():
            tensor = read(name)
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def numbered(path: Path, number: int, count: int) -> str:
    """Return the name of one of several files, as Hugging Face writes it."""
    return f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that save_tensors wrote, mapped: what is not used is not read."""
    index = index_of(path)
    if path.is_file() or not index.is_file():
        return load_file(path)
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index} is damaged: {json.dumps(names)[:80]}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= load_file(path.with_name(name))
    return tensors


INDEX = "model.safetensors.index.json"
TEXT_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
SIDE_FILES = (  # what a directory says about its text, beside tokenizer.json
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What old files hold beside the weights: tables that are computed.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


class Stored(NamedTuple):
    """How one tensor of a file is made of our parameters, and they of it."""

    parts: list[Tensor]  # parameters, one below the other, whole or shared out
    lengths: list[int]  # how many rows of each are stored: all but padding
    rows: Tensor | None  # which of our rows each of theirs is; None: the same
    transposed: bool

    def shape(self) -> tuple[int, ...]:
        """Return the shape of `read()` without making it."""
        shape = sum(self.lengths), *self.parts[0].shape[1:]
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        """Return the tensor; all processes between which it is shared out must ask for it."""
        parts = [to_full(p)[:n] for p, n in zip(self.parts, self.lengths, strict=True)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor if self.rows is None else tensor[self.rows.to(tensor.device)]
        return tensor.T if self.transposed else tensor

    def write(self, tensor: Tensor) -> None:
        """Set the parameters, and padding to zero."""
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor if self.rows is None else tensor[self.rows.argsort()]
        rows = tensor.split(self.lengths)
        for parameter, new in zip(self.parts, rows, strict=True):
            fill(parameter, new)


def stored_tensors(model: LLaMaTransformer) -> dict[str, Stored]:
    """Return how each tensor of a file is stored, without padding rows and tied twins."""
    config, family = model.config, FAMILIES[family_of(model.config)]
    stored: dict[str, Stored] = {}
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".")  # decoder_blocks.0.attention.wq, weight
        layer = "".join(re.findall(r"\.(\d+)\.", place))
        theirs = family.tensors[re.sub(r"\.\d+\.", ".{}.", place)].format(layer) + "." + kind
        module = model.get_submodule(place)
        padded = module in (model.embeddings, model.final_linear)
        part, length = parameter.detach(), config.vocab_size if padded else len(parameter)
        if theirs in stored:
            stored[theirs].parts.append(part)
            stored[theirs].lengths.append(length)
            continue
        rows = None
        last = place.rpartition(".")[2]
        if last in family.interleaved:
            heads = 1 if last == "wkv_a" else config.n_heads
            rows = interleaved_rows(len(part), heads, config.rope_width)
        is_linear = isinstance(module, nn.Linear) and module is not model.final_linear
        transposed = family.transposed and is_linear and kind == "weight"
        stored[theirs] = Stored([part], [length], rows, transposed)
    return stored


def interleaved_rows(count: int, heads: int, rope_width: int) -> Tensor:
    """Return DeepSeek-V3's order of our rows: where a head is rotated, pairs are neighbours."""
    rows = torch.arange(count).view(heads, -1)
    rotated = rows[:, -rope_width:].view(heads, 2, -1).mT  # (heads, rope_width / 2, 2)
    return torch.cat((rows[:, :-rope_width], rotated.flatten(1)), dim=1).flatten()


def side_files(
    config: ModelConfig, tokenizer: Tokenizer, source: Path | None = None
) -> dict[str, bytes]:
    """Return the files that a checkpoint has beside config.json and weights, by name, as read now.

    They are those of `source`, where the weights come from: what a pretrained model says about its
    text (what ends one, how a conversation is written) stays true. What it lacks is made.
    """
    end = tokenizer.end_of_text
    begin = tokenizer.begin_of_text[0] if tokenizer.begin_of_text else end
    ids: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": end}
    theirs: dict[str, dict[str, Any]] = {}
    for name in TEXT_SETTINGS if source else ():
        theirs[name] = text_settings(source, name)
        ids |= {key: theirs[name][key] for key in ids if theirs[name].get(key) is not None}
    begin_word, end_word = (tokenizer.token_bytes(id).decode() for id in (begin, end))
    text = {  # what AutoTokenizer, and a pipeline that pads batches, need beside tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_word,
        "eos_token": end_word,
        "pad_token": end_word,
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    made = {"tokenizer.json": tokenizer.content, "tokenizer_config.json": to_json(text)}
    paths = [source / name for name in SIDE_FILES] if source else []
    made |= {path.name: path.read_bytes() for path in paths if path.is_file()}
    generation = theirs.get("generation_config.json", {})
    if not ids.items() <= generation.items():
        made["generation_config.json"] = to_json(generation | ids)
    return made


def text_settings(directory: Path, name: str) -> dict[str, Any]:
    """Read one of TEXT_SETTINGS, {} if it is not there; UserError for what is no token or id."""
    path = directory / name
    content = read_json(path) if path.is_file() else {}
    for key, value in content.items():
        if key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = value if isinstance(value, list) and value else [value]
            if not all(id is None or fits(id, int) for id in ids):
                raise UserError(f"{path}: {key}={value!r} is no token id")
        elif key in ("bos_token", "eos_token", "pad_token"):
            word = value.get("content") if isinstance(value, dict) else value or ""
            if not isinstance(word, str):
                raise UserError(f"{path}: {key}={value!r} is no token")
    return content


def end_of_text_ids(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a text: generation_config.json's, config.json's, the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        ids = text_settings(directory, name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if None not in ids:
            return ids
    return [tokenizer.end_of_text]


def chat_template(directory: Path) -> str:
    """Return how a conversation is written, as a Jinja template; "" if nothing says so."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template = text_settings(directory, "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else ""
    if not isinstance(template, str):
        raise UserError(f"{directory}/tokenizer_config.json: chat_template={template!r} is no text")
    return template


def save_model(
    model: LLaMaTransformer,
    directory: Path,
    end_of_text: int | None = None,
    files: dict[str, bytes] | None = None,
    writes: bool = True,
) -> None:
    """Write config.json and model.safetensors (fp32) to `directory`, and `files` beside them.

    Without files, generation_config.json says that `end_of_text` begins and ends a text. Processes
    that share the model out all call this; one `writes`.
    """
    tensors = stored_tensors(model)
    shapes = {name: stored.shape() for name, stored in tensors.items()}
    like = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    path = directory / "model.safetensors"
    if not writes:
        return save_tensors(path, like, lambda name: tensors[name].read(), writes)
    directory.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    files = files or {"generation_config.json": to_json(ids)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    write_config(model.config, directory, json.loads(files["generation_config.json"]))
    save_tensors(path, like, lambda name: tensors[name].read().float())


def load_model(
    directory: Path,
    max_seq_len: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    share_out: Callable[[LLaMaTransformer], None] | None = None,
) -> LLaMaTransformer:
    """Read a directory's model into memory; max_seq_len > 0 shortens the context.

    `share_out` divides the model, while it is on the meta device, between the processes that read.
    The rotary tables are fp32 whatever the dtype. UserError, on one line, for whatever is missing,
    damaged or of another architecture; it comes before memory for the weights is asked for.
    """
    config = read_config(directory)
    if max_seq_len > config.max_seq_len:
        raise UserError(
            f"max_seq_len={max_seq_len} is more than the {config.max_seq_len} of {directory}"
        )
    config = replace(config, max_seq_len=max_seq_len or config.max_seq_len)
    with ExitStack() as stack:
        found = open_tensors(directory, stack)
        config = resolve_head(config, found)
        if config.n_layers > len(found):
            raise UserError(f"{directory}: {config.n_layers} layers, but {len(found)} tensors")
        model = shapes_of(config).to(dtype)
        check_tensors(directory, found, stored_tensors(model))
        if share_out:
            share_out(model)
        needed = sum(to_local(parameter).nbytes for parameter in model.parameters())
        check_memory(needed + 8 * config.max_seq_len * config.rope_width, str(directory), device)
        materialize(model, device)
        with torch.no_grad():
            for name, stored in stored_tensors(model).items():
                file, their_name = found[name]
                tensor = file.get_tensor(their_name)
                stored.write(tensor[: config.max_seq_len] if "wpe" in name else tensor)
                if not all(to_local(p).isfinite().all() for p in stored.parts):
                    raise UserError(f"{directory}: {their_name} has numbers that are not finite")
    return model


def resolve_head(config: ModelConfig, found: dict[str, tuple[Any, str]]) -> ModelConfig:
    """Do what transformers does where config.json ties the head and the file has one.

    A head that is not the embeddings stays one of its own; where it is all there is, it is both.
    """
    embeddings = FAMILIES[family_of(config)].tensors["embeddings"] + ".weight"
    if not config.tie_embeddings or "lm_head.weight" not in found:
        return config
    head = found["lm_head.weight"]
    file, name = found.setdefault(embeddings, head)
    same = file.get_tensor(name).equal(head[0].get_tensor(head[1]))
    return config if same else replace(config, tie_embeddings=False)


def check_tensors(
    directory: Path, found: dict[str, tuple[Any, str]], expected: dict[str, Stored]
) -> None:
    """Raise a UserError unless a directory's tensors are those that its config.json describes."""
    unknown = found.keys() - expected.keys() - {"lm_head.weight"}
    wrong = expected.keys() - found.keys() or unknown
    if wrong:
        what = "has more than config.json says:" if wrong is unknown else "lacks"
        raise UserError(f"{directory} {what} {len(wrong)} tensors, one {min(wrong)}")
    for name, stored in expected.items():
        file, their_name = found[name]
        tensor, shape = file.get_slice(their_name), stored.shape()
        theirs = tuple(tensor.get_shape())
        if "wpe" in name:  # of learned positions, a shorter context takes the first
            theirs = min(theirs, shape)
        if theirs != shape:
            raise UserError(f"{directory}: {their_name} is {theirs}, config.json makes it {shape}")
        if tensor.get_dtype() not in ("F32", "BF16", "F16", "F64"):
            kind = tensor.get_dtype()
            raise UserError(f"{directory}: {their_name} is {kind}; quantised weights are not read")


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Return, for each tensor of a directory, the open file that holds it and its name there.

    The names of a model without a head lack a prefix, and a head that is tied may be there alone.
    """
    found: dict[str, tuple[Any, str]] = {}
    for path in weight_files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            prefix = "transformer." if re.match(r"(wte|wpe|h|ln_f)\.", name) else ""
            prefix = "model." if re.match(r"(embed_tokens|layers|norm)\.", name) else prefix
            if prefix + name in found:
                twice = f"{found[prefix + name][1]} and {name}"
                raise UserError(f"{directory} has two tensors for one: {twice}")
            found[prefix + name] = file, name
    return {name: where for name, where in found.items() if not COMPUTED.search(name)}


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory: model.safetensors, or those of its index."""
    path = directory / INDEX
    names = ["model.safetensors"]
    if not (directory / names[0]).is_file() and path.is_file():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path} is damaged: no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(f"{path} points outside its directory: {outside[0]!r}")
    for name in names:
        if not (directory / name).is_file():
            pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt"))
            reasons = [f"; {p} is a pickle, which can run code and is never read" for p in pickles]
            raise UserError(f"no {name} in {directory}{''.join(reasons[:1])}")
    return [directory / name for name in names]
