# For a comparison with nanoGPT's character model: its text and split (the first 90% train), read as
# bytes. Checkpoints are those of a Qwen3.
# Takes: 77 seconds to 3 minutes on two CPU cores (AMD EPYC, Zen 5 and Zen 4), for a validation
# loss of 1.453 nats a byte.
# Text: karpathy/char-rnn's data/tinyshakespeare/input.txt, 1.1 MB, of which 3.9 epochs are read:
#     python prepare.py tinyshakespeare.txt --tokenizer=byte --val_fraction=0.1 \
#         --out=data/shakespeare_char
out_dir = "out/shakespeare_char"
data_dir = "data/shakespeare_char"

n_layers = 4
n_embd = 96
n_heads = 3
max_seq_len = 256
qk_norm = True
tie_embeddings = False

max_steps = 1900
batch_size = 8
tokens_per_step = batch_size * max_seq_len
optimizer = "muon"
momentum = 0.85
lr = 5.9e-3
weight_decay = 0.5
warmup_steps = 20

eval_interval = 0  # the whole validation split once, at the end
eval_tokens = 0
checkpoint_interval = 1000
log_interval = 50
