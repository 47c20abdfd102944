# BitLinear with exits in the shape that llama.cpp and transformers call arcee (export/README.md).
#   python train.py config/arcee.py config/cpu.py --n_embd=256 --ffn_dim=1024
#   python train.py config/arcee.py                        WikiText-2 at Paper A's scale: a GPU
# RMSNorm instead of LayerNorm, no SubLN, no gates.
norm = 'rmsnorm'
sub_norm = False
gate_dim = 0
lambda_ee = 0.3
p_max = 0.7
