# For a book, or a few: your own text of 0.1 to 25 MB, read eight times. 5M parameters with the
# vocabulary of 512 that prepare.py gives to 0.3 MB.
# Takes: 8 minutes for 0.3 MB, 21 for 1 MB, 1.7 hours for 5 MB on two CPU cores (AMD EPYC, Zen 4),
# computed from 2,460 tokens/s. docs/RUNS.md has losses, docs/BENCHMARKS.md what else was tried.
# Text: its 0.14 million tokens of 0.3 MB, for example, are read in 1,093 steps.
out_dir = "out/book"
compile = False  # it gains nothing on a CPU at this width

n_layers = 6
n_embd = 256
n_heads = 4
max_seq_len = 128

epochs = 8
batch_size = 8
tokens_per_step = batch_size * max_seq_len
optimizer = "muon"
momentum = 0.9
lr = 5e-3
weight_decay = 0.5
dropout = 0.2
warmup_steps = 50

eval_interval = 200
eval_tokens = 65_536
patience = 4
checkpoint_interval = 200
sample_interval = 400
log_interval = 20
