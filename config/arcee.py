# BitLinear with early exit in the shape that llama.cpp calls arcee: what export_gguf.py can write.
#   python train.py config/arcee.py                                                  WikiText-2 at Paper A's scale
#   python train.py config/arcee.py config/cpu.py --n_embd=256 --ffn_dim=1024        at the scale of two CPU cores
# RMSNorm instead of LayerNorm, no SubLN, no gates; squared ReLU, rotary positions and grouped queries as they are.
norm = 'rmsnorm'
sub_norm = False
gate_dim = 0
lambda_ee = 0.3
p_max = 0.7
