"""An architecture of one's own as transformers loads it: by AutoModelForCausalLM.from_pretrained

with trust_remote_code=True. train.py copies this file and model.py beside the weights of what no
family of transformers computes; transformers alone runs the copies.
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
        config.use_cache = False
        shape = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
        self.plain = LLaMaTransformer(ModelConfig(**shape))
        # Files have no padding rows, which model.py crops from the logits in any case.
        tied = self.plain.final_linear.weight is self.plain.embeddings.weight
        for layer in (self.plain.embeddings, self.plain.final_linear):
            layer.weight = nn.Parameter(layer.weight.detach()[: config.vocab_size])
        if tied:
            self.plain.final_linear.weight = self.plain.embeddings.weight
        first_names: dict[Tensor, str] = {}
        names = self.named_parameters(remove_duplicate=False)
        named = {name: first_names.setdefault(parameter, name) for name, parameter in names}
        self._tied_weights_keys = {name: first for name, first in named.items() if name != first}
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return all parameters that are another, whatever tie_word_embeddings says."""
        return dict(self._tied_weights_keys)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights that model.py draws."""

    def get_input_embeddings(self) -> nn.Module:
        return self.plain.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.plain.final_linear

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": inputs.get("attention_mask")}

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
