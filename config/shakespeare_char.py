# The race of character models: nanoGPT's text and split (the first 90% train), read as bytes.
#     python prepare.py tinyshakespeare.txt --tokenizer=byte --val_fraction=0.1 \
#         --out=data/shakespeare_char
# The text is karpathy/char-rnn's data/tinyshakespeare/input.txt. Nats per byte are nats per
# character here. Shape and batch won a sweep of 15 runs, one seed each, at equal CPU time on the
# training text alone; the rate was swept at 128 wide.
# Costs: 4.1 million tokens, 4 epochs, at 3.4 MFLOPs each: 290 CPU seconds on one thread of an
# AVX-512 machine, start-up with a warm compile cache included, for a validation loss of 1.5645.
out_dir = "out/shakespeare_char"
data_dir = "data/shakespeare_char"

n_layers = 4
n_embd = 96
n_heads = 3
max_seq_len = 128

max_steps = 4000
batch_size = 8
tokens_per_step = batch_size * max_seq_len
lr = 2.5e-3
warmup_steps = 50

eval_interval = 0  # the whole validation split once, at the end
eval_tokens = 0
checkpoint_interval = 1000
log_interval = 50
