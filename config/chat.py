# A character to talk to, learned from conversations alone: 0.9M parameters. What make chat trains.
# Takes: about a minute on two CPU cores (AMD EPYC): 70 s of one core that was shared.
# A pretrained model takes a lower rate and its own context:
#   --init_from=DIR --optimizer=adamw --lr=2e-5 --epochs=2 --max_seq_len=1024 --tokens_per_step=8192
data_dir = "data/lighthouse"
out_dir = "out/chat"
compile = False

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
