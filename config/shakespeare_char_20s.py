# shakespeare_char.py in 6 to 20 seconds on two cores: a smaller model, and not compiled, for that
# alone takes 10 seconds with a warm cache.
# Costs: 0.25 million tokens, at 1.4 MFLOPs each, for a validation loss of 1.8739.
from config.shakespeare_char import *

out_dir = "out/shakespeare_char_20s"
compile = False

n_layers = 3
n_embd = 64
n_heads = 2
max_seq_len = 128

max_steps = 120
batch_size = 16
momentum = 0.8
lr = 2.2e-2
weight_decay = 0.1
warmup_steps = 10
