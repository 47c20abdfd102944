# Paper A, Table 2, row "EE-only": early-exit loss (A4) and layer skipping (A5) on plain BitLinear.
#   python train.py config/bitskip_ee.py                   WikiText-2 at Paper A's scale
#   python train.py config/bitskip_ee.py config/cpu.py     at the scale of two CPU cores
# 7 to 10 minutes on two cores with cpu.py; at Paper A's scale four hours of a GPU that does 1e14 operations a second
# (an estimate: not run here; the heads of twelve exits are most of it).
# Paper A: best validation PPL 252.37 after 2,100 steps.
linear = 'bitlinear'
lambda_ee = 0.3
p_max = 0.7
