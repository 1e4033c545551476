# The demo: 1.3M parameters learn Shakespeare in under 3 minutes on two CPU cores.
# Costs: 0.6 million tokens, 0.4 of an epoch, at 8.7 MFLOPs each. Not compiled: on a CPU that takes
# a minute, which so short a run does not win back. On text held out of the training part, 450 steps
# of Muon reached 4.628 nats per token, and 900 of AdamW at 4e-3 4.634.
out_dir = "out/tiny"
compile = False

n_layers = 4
n_embd = 128
n_heads = 4
max_seq_len = 128

max_steps = 600
batch_size = 8
tokens_per_step = batch_size * max_seq_len
optimizer = "muon"
momentum = 0.9
lr = 8e-3
warmup_steps = 50

eval_interval = 150
eval_tokens = 32_768
checkpoint_interval = 300
sample_interval = 300
log_interval = 15
snapshots = 7
