"""An architecture of one's own for transformers, which loads it with trust_remote_code=True.

train.py copies this file and model.py beside the weights of what no family of transformers
computes; transformers alone runs the copies.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import LLaMaTransformer, ModelConfig


class PlainllamaConfig(PretrainedConfig):
    """All of config.json: the fields of ModelConfig beside Hugging Face's own keys."""

    model_type = "plainllama"


class PlainllamaForCausalLM(PreTrainedModel, GenerationMixin):
    """The model.py beside this file. Generation has no cache: it reads the whole text each time."""

    config_class = PlainllamaConfig
    base_model_prefix = "plain"  # parameters have model.py's names in the file, and this before

    def __init__(self, config: PlainllamaConfig) -> None:
        super().__init__(config)
        shape = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
        self.plain = LLaMaTransformer(ModelConfig(**shape))
        names: dict[Tensor, str] = {}  # the first of each parameter, which may have several
        named = dict(self.named_parameters(remove_duplicate=False))
        first = {name: names.setdefault(parameter, name) for name, parameter in named.items()}
        self._tied_weights_keys = {name: other for name, other in first.items() if name != other}
        for layer in (self.plain.embeddings, self.plain.final_linear):  # files have no padding
            layer.weight = nn.Parameter(layer.weight.detach()[: config.vocab_size])
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self._tied_weights_keys)  # whatever tie_word_embeddings says

    def _init_weights(self, module: nn.Module) -> None:
        pass  # model.py has drawn them

    def get_input_embeddings(self) -> nn.Module:
        return self.plain.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.plain.final_linear

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """Return logits (B, T, V) and, with labels, the loss of each token's successor.

        Rows that attention_mask (B, T) pads at the left are read as if alone. ValueError for a mask
        with holes, and past max_seq_len.
        """
        if not hasattr(self.plain, "cos"):  # transformers made the model without memory
            self.plain.init_rope()
        padding = torch.zeros(len(input_ids), dtype=torch.long)
        if attention_mask is not None:
            mask = attention_mask.long().cpu()
            begins = nn.functional.pad(mask, (1, 0)).diff() > 0
            if mask.shape != input_ids.shape or begins.sum(dim=1).max() > 1:
                raise ValueError("attention_mask, (B, T), may leave out the ends of rows alone")
            padding = mask.argmax(dim=1)
        logits = input_ids.new_zeros(*input_ids.shape, self.config.vocab_size, dtype=self.dtype)
        for count in padding.unique().tolist():
            rows = (padding == count).nonzero()[:, 0].to(input_ids.device)
            logits[rows, count:] = self.plain(input_ids[rows, count:])[0].to(self.dtype)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **unused)
        return CausalLMOutput(loss=loss, logits=logits)
