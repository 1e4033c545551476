# For a character to talk to, learned from conversations alone: 0.9M parameters (`make chat`).
# Takes: about a minute on two CPU cores (AMD EPYC).
# Text: reads the conversations in data_dir once. docs/CHAT.md has settings for a pretrained model.
data_dir = "data/lighthouse"
out_dir = "out/chat"
compile = False  # compiling takes longer than it saves in so short a run

n_layers = 4
n_embd = 128
n_heads = 4
max_seq_len = 256

epochs = 1
batch_size = 4
tokens_per_step = batch_size * max_seq_len
optimizer = "muon"
momentum = 0.9
lr = 8e-3
warmup_steps = 20

eval_interval = 0
checkpoint_interval = 0
log_interval = 20
