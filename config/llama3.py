# Paper B, Llama3 FP32: the same model in full precision, without early exit.
#   python train.py config/llama3.py                             1.06B parameters: several GPUs
# Paper B: PPL 846.34 (phase 1); 1.19 with exits trained (phase 2): here config/layerskip.py.
from config.paper_b_model import *
from config.paper_b_training import *
linear = 'fp'
lambda_ee = 0.0
p_max = 0.0
