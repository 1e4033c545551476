"""Models as Hugging Face directories, read and written: weights, and the files beside them.

What `save_model` writes, transformers loads with equal logits, and `load_model` reads what
transformers writes of the families of families.py, in any floating-point format, in one file or in
shards. Nothing is ever unpickled, and a model.py that lies beside weights is never run.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import LLaMaTransformer, ModelConfig
from plainllama.architecture import differences, label_of, own_files, toy_numbers, toy_of
from plainllama.chat import Template
from plainllama.distributed import fill, materialize, to_full, to_local
from plainllama.families import FAMILIES, OWN, OWN_FORM, base_of, read_config, write_config
from plainllama.lora import FILE, LoRALinear, read_adapter
from plainllama.machine import check_memory, draw_weights, shapes_of
from plainllama.settings import UserError, fits, read_json, say, to_json, write_json
from plainllama.tokenizer import Tokenizer

LARGEST_FILE = 1_000_000_000  # bytes of tensors in a file: as many are in memory at once
SIDE_FILES = (  # what a directory says about its model and its text, beside tokenizer.json
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What old files hold beside the weights: tables that are computed.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
POSITIONS = ("positions.weight", "transformer.wpe.weight")  # of which a shorter context takes some


def save_tensors(
    path: Path, like: dict[str, Tensor], read: Callable[[str], Tensor], writes: bool = True
) -> None:
    """Write the tensors that `read` returns, of shapes and dtypes as in `like`, to `path`.

    More than LARGEST_FILE bytes go to NAME-00001-of-0000N.safetensors and so on, and an index. All
    processes that share the tensors out call this and read all tensors in the same order; the one
    with `writes` writes. OSError where the disk refuses, but only after all tensors were read.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        like,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{path.stem}{{suffix}}{path.suffix}",
        max_shard_size=LARGEST_FILE,
    )
    failure = None
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = read(name)
            if writes:
                shard[name] = tensor.cpu().contiguous()
        if writes and not failure:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(shard, path.with_name(file), metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                failure = error
    if failure:
        raise OSError(str(failure)) from failure
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(path.with_name(f"{path.name}.index.json"), index)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that save_tensors wrote, mapped: what is not used is not read."""
    files = [load_file(file) for file in files_of(path)]
    return {name: tensor for file in files for name, tensor in file.items()}


def files_of(path: Path) -> list[Path]:
    """Return the files that hold a file's tensors: itself, or those that its index names."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path]
    weight_map = read_json(index).get("weight_map")
    names = sorted(map(str, weight_map.values())) if isinstance(weight_map, dict) else []
    if not all(names or [""]) or any(Path(name).name != name for name in names):
        raise UserError(f"{index} is damaged: its weight_map names no files beside it")
    return [path.with_name(name) for name in dict.fromkeys(names)]


class Stored(NamedTuple):
    """How one tensor of a file is made of our parameters, and they of it."""

    parameters: list[Tensor]  # one below the other in the file, each whole or shared out
    adapted: list[LoRALinear | None]  # the layer of each, where its adapter is to be added
    lengths: list[int]  # how many rows of each are stored: all but padding
    rows: Tensor | None  # which of our rows each of theirs is; None: the same
    transposed: bool

    def shape(self) -> tuple[int, ...]:
        """Return the shape of `read()` without making it."""
        shape = sum(self.lengths), *self.parameters[0].shape[1:]
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        """Return the tensor; all processes between which it is shared out must ask for it."""
        parts = zip(self.parameters, self.adapted, self.lengths, strict=True)
        blocks = [(a.merged() if a else to_full(p))[:length] for p, a, length in parts]
        tensor = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        tensor = tensor if self.rows is None else tensor[self.rows.to(tensor.device)]
        return tensor.T if self.transposed else tensor

    def write(self, tensor: Tensor) -> None:
        """Set the parameters, and padding to zero."""
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor if self.rows is None else tensor[self.rows.argsort()]
        for parameter, rows in zip(self.parameters, tensor.split(self.lengths), strict=True):
            fill(parameter, rows)


def stored_tensors(
    model: LLaMaTransformer, model_type: str = "", adapters: bool = False
) -> dict[str, Stored]:
    """Return how each tensor of a file is stored, without padding rows and tied twins.

    By default in the form that save_model writes. What a family has no name for keeps model.py's.
    They are the weights, with adapters added, or A and B of the adapters themselves.
    """
    config = model.config
    family = FAMILIES.get(model_type or label_of(config)[0], OWN_FORM)
    stored: dict[str, Stored] = {}
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".")  # decoder_blocks.0.attention.wq, weight
        if kind.startswith("lora_") != adapters:
            continue
        theirs = f"{family.module(place)}.{kind}" if family.module(place) else name
        module, layer = model.get_submodule(place), place.rpartition(".")[2]
        is_padded = module in (model.embeddings, model.final_linear)
        length = config.vocab_size if is_padded else len(parameter)
        if theirs not in stored:
            rows = None
            if layer in family.interleaved and kind != "lora_A":
                heads = 1 if layer == "wkv_a" else config.n_heads
                rows = interleaved_rows(len(parameter), heads, config.rope_width)
            is_linear = isinstance(module, nn.Linear) and module is not model.final_linear
            transposed = family.transposed and is_linear and kind == "weight"
            stored[theirs] = Stored([], [], [], rows, transposed)
        is_adapted = isinstance(module, LoRALinear) and kind == "weight"
        stored[theirs].parameters.append(parameter.detach())
        stored[theirs].adapted.append(module if is_adapted else None)
        stored[theirs].lengths.append(length)
    return stored


def interleaved_rows(count: int, heads: int, rope_width: int) -> Tensor:
    """Return DeepSeek-V3's order of our rows: where a head is rotated, pairs are neighbours."""
    rows = torch.arange(count).view(heads, -1)
    rotated = rows[:, -rope_width:].view(heads, 2, -1).mT  # (heads, rope_width / 2, 2)
    return torch.cat((rows[:, :-rope_width], rotated.flatten(1)), dim=1).flatten()


def side_files(
    config: ModelConfig,
    tokenizer: Tokenizer,
    source: Path | None = None,
    template: Template | None = None,
) -> dict[str, bytes]:
    """Return the files that a checkpoint has beside config.json and weights, by name, as read now.

    They are those of `source`, where the weights come from: what a pretrained model says about its
    text (what ends one, how a conversation is written) stays true. What it lacks is made. A model
    that learns conversations has their `template`, and the end of an answer ends a text.
    """
    begin, end = (*tokenizer.begin_of_text, tokenizer.end_of_text)[0], tokenizer.end_of_text
    begin_word, end_word = (tokenizer.token_bytes(id).decode() for id in (begin, end))
    text = {  # what AutoTokenizer, and a pipeline that pads batches, need beside tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_word,
        "eos_token": end_word,
        "pad_token": end_word,
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token_id": begin, "eos_token_id": end}
    files = {
        "tokenizer.json": tokenizer.content,
        "tokenizer_config.json": to_json(text),
        "generation_config.json": to_json(ids),
    }
    files |= own_files(config)
    if source:
        source = base_of(source)
        found = [name for name in SIDE_FILES if (source / name).is_file()]
        files |= {name: (source / name).read_bytes() for name in found}
        generation = text_settings(source, "generation_config.json")
        told = text_settings(source, "config.json") | generation
        ids |= {key: told[key] for key in ids if told.get(key) is not None}
        ends = as_list(ids["eos_token_id"])
        if end not in ends:  # of a tuned chat model, whose new texts end otherwise than its turns
            ids["eos_token_id"] = [*ends, end]
        if not ids.items() <= generation.items():
            files["generation_config.json"] = to_json(generation | ids)
    if template:
        ends = as_list(ids["eos_token_id"])
        told = {"eos_token_id": [template.end, *(id for id in ends if id != template.end)]}
        told = json.loads(files["generation_config.json"]) | told
        files["generation_config.json"] = to_json(told)
        told = json.loads(files["tokenizer_config.json"]) | template.settings
        files["tokenizer_config.json"] = to_json(told)
        files["chat_template.jinja"] = template.source.encode()
    return files


def text_settings(directory: Path, name: str) -> dict[str, Any]:
    """Return the settings of a JSON file; {} if it is not there. UserError for odd token ids."""
    path = base_of(directory) / name
    content = read_json(path) if path.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(key)
        if not all(id is None or (fits(id, int) and 0 <= id < 2**31) for id in as_list(value)):
            raise UserError(f"{path}: {key}={value!r} is no token id")
    return content


def as_list(ids: Any) -> list[Any]:
    """Return the ids that a setting has, which is one or a list."""
    return ids if isinstance(ids, list) else [ids]


def end_of_text_ids(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a text: generation_config.json's, config.json's, the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        ids = as_list(text_settings(directory, name).get("eos_token_id"))
        if ids and None not in ids:
            return ids
    return [tokenizer.end_of_text]


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
    tensors, family = stored_tensors(model), label_of(model.config)[0]
    like = {name: torch.empty(t.shape(), device="meta") for name, t in tensors.items()}
    path = directory / "model.safetensors"
    save_tensors(path, like, lambda name: tensors[name].read().float(), writes)
    if writes:
        ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        made = {"generation_config.json": to_json(ids)}
        files = files or made | own_files(model.config)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        source = json.loads(files.get("config.json", b"{}"))
        ids = json.loads(files["generation_config.json"])
        if family == "llama" and source.get("model_type") == "mistral":  # which no shape tells
            family = "mistral"
        numbers = toy_numbers(toy_of(model.config))[0] if family == OWN else ()
        config = replace(model.config, max_seq_len=context_of(model.config, source))
        write_config(config, directory, ids, family, numbers)


def context_of(config: ModelConfig, source: dict[str, Any]) -> int:
    """Return the context that a model is said to have: that of config.json where it began.

    Training on shorter windows takes nothing from rotary positions; learned ones are cut.
    """
    before = source.get("max_position_embeddings", 0) if config.position == "rope" else 0
    return max(config.max_seq_len, before)


def load_model(
    directory: Path,
    max_seq_len: int = 0,
    device: torch.device | str = "cpu",
    shape: ModelConfig | None = None,
    share_out: Callable[[LLaMaTransformer], None] | None = None,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 0,
) -> LLaMaTransformer:
    """Read a directory's model into memory; max_seq_len > 0 shortens the context.

    A directory with an adapter, alone or beside weights, is the model with the adapter added.
    `share_out` divides the model, while it is on the meta device, between the processes that read.
    The rotary tables are fp32 whatever the dtype. UserError, on one line, for whatever is missing,
    damaged or of another architecture; it comes before memory for the weights is asked for. The
    model is in evaluation mode. With a `shape`, it becomes one of that, even if model.py is another
    now: what the directory lacks is then drawn, what it has too much is left out, both are said.
    A larger vocab_size adds words, whose rows are the mean of the others.
    """
    adapter, directory = read_adapter(directory), base_of(directory)
    name = read_json(directory / "config.json").get("model_type")
    config = read_config(directory)
    if max_seq_len > config.max_seq_len:
        raise UserError(
            f"max_seq_len={max_seq_len} is more than the {config.max_seq_len} of {directory}"
        )
    known = {"vocab_size": config.vocab_size}
    config = replace(shape or config, max_seq_len=max_seq_len or config.max_seq_len, **known)
    with ExitStack() as stack:
        found = open_tensors(directory, name, stack)
        config = resolve_head(config, name, found)
        if config.n_layers > len(found):
            raise UserError(f"{directory}: {config.n_layers} layers, but {len(found)} tensors")
        model = shapes_of(config).to(dtype)
        expected = stored_tensors(model, name)
        is_own = OWN in (name, label_of(config)[0])
        for text in differences(directory, name, config, found.keys(), expected.keys()):
            way = f": undo the change, or train on with --init_from={directory}"
            if shape is None or not is_own:
                raise UserError(text + way if is_own else text)
            say(f"warning: {text}")
        check_tensors(directory, found, expected)
        adapter.check(expected)
        if vocab_size > config.vocab_size:
            config = replace(config, vocab_size=vocab_size)
            model = shapes_of(config).to(dtype)
        if share_out:
            share_out(model)
        needed = sum(to_local(parameter).nbytes for parameter in model.parameters())
        check_memory(needed + 8 * config.max_seq_len * config.rope_width, str(directory), device)
        materialize(model, device)
        if expected.keys() - found.keys():
            draw_weights(model)
        with torch.no_grad():
            for place, stored in stored_tensors(model, name).items():
                if place not in found:
                    continue
                file, their_name = found[place]
                tensor = adapter.added_to(place, file.get_tensor(their_name), stored.transposed)
                if (added := stored.shape()[0] - len(tensor)) > 0:
                    mean = tensor.float().mean(0, keepdim=True).type_as(tensor)
                    tensor = torch.cat((tensor, mean.expand(added, -1)))
                stored.write(tensor[: config.max_seq_len] if place in POSITIONS else tensor)
                if not all(to_local(p).isfinite().all() for p in stored.parameters):
                    raise UserError(f"{directory}: {their_name} has numbers that are not finite")
    return model.eval()


def resolve_head(
    config: ModelConfig, model_type: str, found: dict[str, tuple[Any, str]]
) -> ModelConfig:
    """Do what transformers does where config.json ties the head and the file has one.

    A head that is not the embeddings stays one of its own; where it is all there is, it is both.
    """
    if not config.tie_embeddings or "lm_head.weight" not in found:
        return config
    embeddings = FAMILIES[model_type].tensors["embeddings"] + ".weight"
    head = found["lm_head.weight"]
    file, name = found.setdefault(embeddings, head)
    same = file.get_tensor(name).equal(head[0].get_tensor(head[1]))
    return config if same else replace(config, tie_embeddings=False)


def check_tensors(
    directory: Path, found: dict[str, tuple[Any, str]], expected: dict[str, Stored]
) -> None:
    """Raise a UserError unless tensors have the shapes of those expected, and can be read."""
    for name in [name for name in expected if name in found]:
        stored, (file, their_name) = expected[name], found[name]
        tensor, shape = file.get_slice(their_name), stored.shape()
        theirs = tuple(tensor.get_shape())
        if name in POSITIONS:  # of learned positions, a shorter context takes the first
            theirs = min(theirs, shape)
        if theirs != shape:
            raise UserError(f"{directory}: {their_name} is {theirs}, the model has {shape}")
        if tensor.get_dtype() not in ("F32", "BF16", "F16", "F64"):
            kind = tensor.get_dtype()
            raise UserError(f"{directory}: {their_name} is {kind}; quantised weights are not read")


def weight_files(directory: Path) -> list[Path]:
    """Return the files from which load_model reads weights."""
    files = files_of(base_of(directory) / "model.safetensors")
    return [*files, directory / FILE] if (directory / FILE).is_file() else files


def open_tensors(directory: Path, model_type: str, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Return, for each tensor of a directory, the open file that holds it and its name there.

    Files of a model without a head, and GPT-2's own, leave a prefix out of all names.
    """
    prefix = ""
    if model_type != OWN:
        prefix = FAMILIES[model_type].tensors["embeddings"].split(".")[0] + "."
    found: dict[str, tuple[Any, str]] = {}
    for path in files_of(directory / "model.safetensors"):
        if not path.is_file():
            raise UserError(f"no {path.name} in {directory}; pickles (.bin, .pt) are never read")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            is_whole = name.startswith((prefix, "lm_head."))
            if model_type == OWN:
                found[name.removeprefix("plain.")] = file, name  # which transformers writes
            elif not COMPUTED.search(name):
                found[name if is_whole else prefix + name] = file, name
    return found
