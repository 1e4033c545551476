# The GPT that is small enough to be drawn number by number (bbycroft.net/llm): 3 layers, 3 heads,
# 48 wide. With its 3 letters and 11 positions it has 85,584 parameters; here it reads windows of 64
# bytes, after `python prepare.py --tokenizer=byte --out=data/shakespeare-bytes`.
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
