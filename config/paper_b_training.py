# Paper B's training, phase 2 (Table 1, section 3.3), shared by its five variants:
#   python train.py config/tinystories_v1.py
# This is phase 2, with early exit; the overlay config/phase1.py takes that away.
dataset = 'tinystories'
batch_size = 16
max_iters = 50000
eval_interval, patience = 1000, 0
warmup_iters = 1000
schedule = 'linear'
lambda_ee = 0.3
ee_weighting = 'late'  # B6
p_max, skip_normalize = 0.5, True  # (with sum 1, p_l is at most 0.13, not 0.5)
