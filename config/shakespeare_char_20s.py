# For the same comparison in a few seconds: a smaller model than shakespeare_char.py's.
# Takes: 6 seconds on two CPU cores (AMD EPYC, Zen 5), up to 20 on older ones, for a validation loss
# of 1.87 nats a byte.
# Text: that of shakespeare_char.py; a quarter of it is read.
from config.shakespeare_char import *

out_dir = "out/shakespeare_char_20s"
compile = False  # compiling takes longer than it saves in so short a run

n_layers = 3
n_embd = 64
n_heads = 2
max_seq_len = 128

max_steps = 120
batch_size = 16
momentum = 0.8
lr = 2e-2
weight_decay = 0.1
warmup_steps = 10

checkpoint_interval = 0  # only at the end
