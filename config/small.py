# For a night on a CPU and your own text of 25 MB or more: 15.7M parameters with prepare.py's
# default vocabulary of 4,096.
# Takes: 2 hours on two CPU cores of an AMD EPYC (Zen 5), 10 on slower ones (100 GFLOP/s). Both are
# computed, not measured.
# Text: reads 33 million tokens, 100 MB.
out_dir = "out/small"

n_layers = 8
n_embd = 384
n_heads = 6
max_seq_len = 256

max_steps = 1000
batch_size = 16
tokens_per_step = 8 * batch_size * max_seq_len  # 8 micro-steps on one device
optimizer = "muon"
momentum = 0.9
lr = 3.6e-3
warmup_steps = 100

eval_interval = 200
checkpoint_interval = 200
sample_interval = 200
