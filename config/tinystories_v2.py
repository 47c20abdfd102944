# Paper B, BitSkip-V2: 4-bit activations behind a Hadamard transform, gentler optimization.
#   python train.py config/tinystories_v2.py                     1.06B parameters: several GPUs
#   python train.py config/tinystories_v2.py config/phase1.py    without early exit
# Paper B: PPL 210.24 (phase 2), 26,048.98 (phase 1). Its text says "4-bit weight quantization"; its
# Table 2 says that the 4 bits are those of activations, on ternary weights.
from config.paper_b_model import *
from config.paper_b_training import *
linear = 'hbitlinear'
act_bits = 4
learning_rate = 3e-4
warmup_iters = 4000
grad_clip = 0.5
