# For studying DeepSeek-V3's attention: tiny.py with multi-head latent attention, whose cache holds
# 48 numbers a token and layer instead of 256. Checkpoints are DeepseekV3ForCausalLM directories
# without experts. Time and text are about those of tiny.py.
from config.tiny import *

out_dir = "out/mla"

use_mla = True
kv_lora_rank = 32
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
