# For those who want to see every number: the GPT that is drawn at bbycroft.net/llm, with 3 layers,
# 3 heads and a width of 48. With the drawing's 3 letters and 11 positions it has 85,584 parameters.
# Here it reads windows of 64 bytes, and takes less time than tiny.py.
# Text: `python prepare.py --tokenizer=byte --out=data/shakespeare-bytes`.
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
