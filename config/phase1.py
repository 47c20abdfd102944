# Overlay, Paper B's phase 1: no early-exit loss and no layer skipping.
#   python train.py config/tinystories_v1.py config/phase1.py
lambda_ee, p_max = 0.0, 0.0
