# Paper A, Table 2, row "EE-only": exit loss (A4), layer skipping (A5) and gates (A9) on BitLinear.
#   python train.py config/bitskip_ee.py config/cpu.py     at the scale of two CPU cores
#   python train.py config/bitskip_ee.py                   WikiText-2 at Paper A's scale: a GPU
# Paper A: best validation PPL 252.37 in a run of 2,100 steps (the best likely at 1,600).
linear = 'bitlinear'
lambda_ee, lambda_q, lambda_r = 0.3, 0.05, 0.2
p_max = 0.7
