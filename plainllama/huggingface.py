"""Models as Hugging Face directories, read and written: weights, and the files beside them.

What `save_model` writes, transformers loads with equal logits, and `load_model` reads what
transformers writes of the families of families.py, in any floating-point format, in one file or in
shards. Nothing is ever unpickled, and a model.py that lies beside weights is never run.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LLaMaTransformer, ModelConfig
from plainllama.architecture import differences, label_of, own_files, toy_numbers, toy_of
from plainllama.chat import Template
from plainllama.distributed import materialize, to_local
from plainllama.families import FAMILIES, OWN, base_of, read_config, write_config
from plainllama.lora import FILE, read_adapter
from plainllama.machine import (
    check_memory,
    choose_dtype,
    draw_weights,
    find_device,
    shapes_of,
)
from plainllama.settings import fits, read_json, to_json
from plainllama.tensors import Stored, files_of, load_tensors, save_tensors, stored_tensors
from plainllama.terminal import UserError, say
from plainllama.tokenizer import Tokenizer, load_tokenizer

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
    begin, end = tokenizer.begin_id, tokenizer.end_of_text
    begin_word, end_word = (tokenizer.token_bytes(id).decode() for id in (begin, end))
    text = {  # what AutoTokenizer, and a pipeline that pads batches, need beside tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_word,
        "eos_token": end_word,
        "pad_token": end_word,
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": tokenizer.content, "tokenizer_config.json": to_json(text)}
    files |= own_files(config)
    ids, generation = {"bos_token_id": begin, "eos_token_id": end}, {}
    if source:
        source = base_of(source)
        found = [name for name in SIDE_FILES if (source / name).is_file()]
        files |= {name: (source / name).read_bytes() for name in found}
        generation = text_settings(source, "generation_config.json")
        told = text_settings(source, "config.json") | generation
        ids |= {key: told[key] for key in ids if told.get(key) is not None}
    ends = as_list(ids["eos_token_id"])
    wanted = ends if end in ends else [*ends, end]  # a tuned chat model's turns end otherwise
    if template:
        wanted = [template.end, *(id for id in wanted if id != template.end)]
        told = json.loads(files["tokenizer_config.json"]) | template.settings
        files["tokenizer_config.json"] = to_json(told)
        files["chat_template.jinja"] = template.source.encode()
    if wanted != ends:
        ids["eos_token_id"] = wanted
    if not ids.items() <= generation.items():
        files["generation_config.json"] = to_json(generation | ids)
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


def load_with_tokenizer(
    directory: Path, device: str = "auto", dtype: str = "auto"
) -> tuple[LLaMaTransformer, Tokenizer]:
    """Read a directory's model to a device, in a dtype, and its tokenizer; UserError if amiss."""
    tokenizer, place = tokenizer_of(directory), find_device(device)
    number_format = choose_dtype(dtype, place, read_config(directory).n_embd)
    model = load_model(directory, device=place, dtype=number_format)
    V = model.config.vocab_size
    for token in (tokenizer.vocab_size - 1, *tokenizer.ends):
        if not 0 <= token < V:
            raise UserError(f"{directory}: token {token} does not fit the model's {V} tokens")
    return model, tokenizer


def tokenizer_of(directory: Path) -> Tokenizer:
    """Return the tokenizer of a model, which knows what ends the model's texts."""
    tokenizer = load_tokenizer(base_of(directory) / "tokenizer.json")
    tokenizer.ends = end_of_text_ids(directory, tokenizer)
    return tokenizer


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
        # Training on shorter windows takes nothing from rotary positions; learned ones are cut.
        is_rotary, context = model.config.position == "rope", model.config.max_seq_len
        before = source.get("max_position_embeddings", 0) if is_rotary else 0
        config = replace(model.config, max_seq_len=max(context, before))
        numbers = toy_numbers(toy_of(model.config))[0] if family == OWN else ()
        write_config(config, directory, ids, family, numbers)


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
    name, config = read_json(directory / "config.json").get("model_type"), read_config(directory)
    S, V = max_seq_len or config.max_seq_len, config.vocab_size
    if max_seq_len > config.max_seq_len:
        raise UserError(f"max_seq_len={S} is more than the {config.max_seq_len} of {directory}")
    found = find_tensors(directory, name)
    config = replace(shape or config, max_seq_len=S, vocab_size=V)
    if config.tie_embeddings and "lm_head.weight" in found:
        # As in transformers: a head that is not the embeddings stays one of its own; where it is
        # all there is, it is both.
        head, embeddings = found["lm_head.weight"], FAMILIES[name].tensors["embeddings"]
        tied = found.setdefault(f"{embeddings}.weight", head).equal(head)
        config = replace(config, tie_embeddings=tied)
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
    if vocab_size > V:
        config = replace(config, vocab_size=vocab_size)
        model = shapes_of(config).to(dtype)
    if share_out:
        share_out(model)
    needed = sum(to_local(parameter).nbytes for parameter in model.parameters())
    check_memory(needed + 8 * S * config.rope_width, str(directory), device)
    materialize(model, device)
    if expected.keys() - found.keys():
        draw_weights(model)
    for place, stored in stored_tensors(model, name).items():
        if place in found:
            tensor = adapter.added_to(place, found[place], stored.transposed)
            if (added := stored.shape()[0] - len(tensor)) > 0:
                mean = tensor.float().mean(0, keepdim=True).type_as(tensor)
                tensor = torch.cat((tensor, mean.expand(added, -1)))
            stored.write(tensor[:S] if place in POSITIONS else tensor)
            if not all(to_local(p).isfinite().all() for p in stored.parameters):
                raise UserError(f"{directory}: {place} has numbers that are not finite")
    return model.eval()


def find_tensors(directory: Path, model_type: str) -> dict[str, Tensor]:
    """Return a directory's tensors, mapped, by the names that save_model would give them.

    Files of a model without a head, and GPT-2's own, leave a prefix out of all names.
    """
    tensors = load_tensors(directory / "model.safetensors")
    if model_type == OWN:  # to whose names transformers adds a prefix
        return {name.removeprefix("plain."): tensor for name, tensor in tensors.items()}
    prefix = FAMILIES[model_type].tensors["embeddings"].split(".")[0] + "."
    whole = prefix, "lm_head."
    return {
        name if name.startswith(whole) else prefix + name: tensor
        for name, tensor in tensors.items()
        if not COMPUTED.search(name)
    }


def check_tensors(directory: Path, found: dict[str, Tensor], expected: dict[str, Stored]) -> None:
    """Raise a UserError unless tensors have the shapes of those expected, and can be read."""
    for name in [name for name in expected if name in found]:
        tensor, shape = found[name], expected[name].shape()
        theirs = tuple(tensor.shape)
        # Of learned positions, a shorter context takes the first.
        if (min(theirs, shape) if name in POSITIONS else theirs) != shape:
            raise UserError(f"{directory}: {name} is {theirs}, the model has {shape}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{directory}: {name} is {kind}; quantised weights are not read")


def weight_files(directory: Path) -> list[Path]:
    """Return the files from which load_model reads weights."""
    files = files_of(base_of(directory) / "model.safetensors")
    return [*files, directory / FILE] if (directory / FILE).is_file() else files
