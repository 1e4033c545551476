# For seeing every number: the GPT that is drawn at bbycroft.net/llm, with 3 layers, 3 heads and a
# width of 48. It takes less time than tiny.py.
# Text: reads 0.6 MB of it; `python prepare.py --tokenizer=byte --out=data/shakespeare-bytes`.
from config.tiny import *

out_dir = "out/nano_gpt"
data_dir = "data/shakespeare-bytes"

position = "learned"
norm = "layernorm"
mlp = "gelu"
bias = True

n_layers = 3
n_embd = 48
n_heads = 3
max_seq_len = 64

batch_size = 16
tokens_per_step = batch_size * max_seq_len
