# For a book, or some: text that is read several times.
out_dir = "out/book"

n_layers = 4
n_embd = 128
n_heads = 4
max_seq_len = 128

max_steps = 600
epochs = 8
batch_size = 8
tokens_per_step = batch_size * max_seq_len
optimizer = "muon"
momentum = 0.9
lr = 7.3e-3
weight_decay = 0.5
dropout = 0.2
warmup_steps = 50

eval_interval = 150
