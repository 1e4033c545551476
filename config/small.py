# For a night on a CPU, or your own text of 25 MB or more: 15.7M parameters with prepare.py's
# default vocabulary of 4,096.
# Takes: on two CPU cores about 10 hours at 100 GFLOP/s, or about 2 hours with an AMD EPYC (Zen 5),
# by the speed of a model of 10.6M there. Both are computed, not measured.
# Text: reads 33 million tokens, 100 MB; a text of 25 MB is read four times.
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
