# Paper A, Table 2, row "BitSkip (H+EE)": Hadamard, early-exit loss and layer skipping, all at once.
#   python train.py config/bitskip_h_ee.py                 WikiText-2 at Paper A's scale
#   python train.py config/bitskip_h_ee.py config/cpu.py   at the scale of two CPU cores
# With cpu.py a validation PPL of 4.62 a byte, in 10 to 12 minutes of one core of an AMD EPYC;
# at Paper A's scale four hours of a GPU that does 1e14 operations a second (an estimate: not run here; the
# heads of twelve exits are most of it).
# Paper A: best validation PPL 216.06 after 1,800 steps.
linear = 'hbitlinear'
lambda_ee = 0.3
p_max = 0.7
