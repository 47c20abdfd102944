# Paper A, Table 2, row "BitSkip (H+EE)": Hadamard, exit loss, layer skipping and gates.
#   python train.py config/bitskip_h_ee.py config/cpu.py   at the scale of two CPU cores
#   python train.py config/bitskip_h_ee.py                 WikiText-2 at Paper A's scale: a GPU
# Paper A: best validation PPL 216.06 in a run of 1,800 steps (the best likely at 1,300).
linear = 'hbitlinear'
lambda_ee, lambda_q, lambda_r = 0.3, 0.05, 0.2
p_max = 0.7
