# The demo, and the config to try things with: 1.3M parameters.
# Takes: 40 to 90 seconds on two CPU cores (AMD EPYC).
# Text: reads 0.6 million tokens, 2 MB, which is 0.4 epochs of Shakespeare's plays.
out_dir = "out/tiny"
compile = False  # compiling takes longer than it saves in so short a run

n_layers = 4
n_embd = 128
n_heads = 4
max_seq_len = 128

max_steps = 600
batch_size = 8
tokens_per_step = batch_size * max_seq_len
optimizer = "muon"
momentum = 0.9
lr = 7.3e-3
warmup_steps = 50

eval_interval = 150
eval_tokens = 32_768
checkpoint_interval = 300
sample_interval = 300
log_interval = 15
snapshots = 7
