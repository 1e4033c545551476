"""Write from random weights, by nanoGPT's model or ours, and print the tokens a second.

python decode.py FOLDER SHAPE_AS_JSON DEVICE DTYPE TEXTS N_TOKENS [compiled] [int8]
"""

import json
import sys
import time

import torch

folder, shape, device, dtype, texts, n_tokens, *ways = sys.argv[1:]
sys.path.insert(0, folder)
import model  # noqa: E402

prompt = torch.zeros(int(texts), 1, dtype=torch.long)
if hasattr(model, "GPT"):
    network = model.GPT(model.GPTConfig(**json.loads(shape)))
    network.eval().to(device, getattr(torch, dtype))

    def write() -> None:
        network.generate(prompt.to(device), int(n_tokens), top_k=1).tolist()
else:
    from plainllama.generate import generate
    from plainllama.inference import prepare_decoding, quantize_int8

    network = model.LLaMaTransformer(model.ModelConfig(**json.loads(shape)))
    network.eval().to(device, getattr(torch, dtype))
    if "int8" in ways:
        quantize_int8(network)
    read = prepare_decoding(network, int(texts), "compiled" in ways, 1 + int(n_tokens))

    def greedy(logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def write() -> None:
        for ids in generate(network, prompt.tolist(), int(n_tokens), greedy, 1, read):
            ids.tolist()


write()
start = time.perf_counter()
write()
print("tok/s:", int(texts) * int(n_tokens) / (time.perf_counter() - start))
