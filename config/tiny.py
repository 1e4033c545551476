# The demo: Shakespeare in about 2 minutes on two CPU cores.
out_dir = "out/tiny"

n_layers = 4
n_embd = 128
n_heads = 4
max_seq_len = 128

max_steps = 600
batch_size = 16
tokens_per_step = batch_size * max_seq_len
lr = 3e-3
warmup_steps = 50

eval_interval = 200
checkpoint_interval = 200
sample_interval = 200
compile = False
